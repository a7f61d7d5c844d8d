"""The views: what is where, how fast it went, what failed, and what is set up how."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator

import pytest
from psycopg.rows import dict_row

from support.rigging import Filling, Rig, fill, rows, scalar
from support.server import Connection, Server
from support.stubs import add_stub
from support.talk import DECLARING

pytest_plugins = ["support.rig"]

Knowledge = Callable[..., str]
Connect = Callable[..., Connection]
Record = dict[str, object]


@pytest.fixture
def server(rig: Rig) -> Server:
    return rig.server


def progress(connection: Connection, relation: str = "knowledge") -> Record:
    with connection.cursor(row_factory=dict_row) as cursor:
        cursor.execute("select * from embedding_progress where relation = %s::regclass", [relation])
        (record,) = cursor.fetchall()
    return record


def counts(connection: Connection, relation: str = "knowledge") -> dict[str, object]:
    record = progress(connection, relation)
    names = ("total", "embedded", "pending", "blank", "failed", "waiting", "truncated")
    return {name: record[name] for name in names if record[name]}


# --- progress --------------------------------------------------------------------------------------------------


def test_progress_counts_each_kind_of_row(db: Connection, declared: Knowledge) -> None:
    declared(texts=["one", "two", "word " * 100, "raiseword", "nanword", "", " \t\n", " " * 300])
    db.execute("insert into knowledge (content) values (null)")
    fill(db)
    db.execute("update autoembed.failure set next_try = null where key = '[4]'")
    db.execute("insert into knowledge (content) values ('later'), ('later still')")
    wanted = {"total": 11, "embedded": 3, "pending": 2, "blank": 4, "failed": 1, "waiting": 1, "truncated": 1}
    assert counts(db) == wanted
    assert (progress(db)["exact"], progress(db)["margin"]) == (True, 0)


def test_progress_of_an_empty_table(db: Connection, declared: Knowledge) -> None:
    declared()
    db.execute("delete from knowledge")
    assert counts(db) == {}


def test_progress_before_and_after(db: Connection, declared: Knowledge, rig: Rig) -> None:
    declared(40)
    assert counts(db) == {"total": 40, "pending": 40}
    before = progress(db)
    assert (before["rows_per_second"], before["time_left"], before["oldest_pending"]) == (None, None, None)
    rig.pace(0.1)
    fill(db, batch=8, max_rows=24)
    half = progress(db)
    speed, left = half["rows_per_second"], half["time_left"]
    assert isinstance(speed, float)
    assert 5 < speed < 80
    assert abs(left.total_seconds() - 16 / speed) <= 1  # type: ignore[attr-defined]
    fill(db)
    assert counts(db) == {"total": 40, "embedded": 40}
    assert str(progress(db)["time_left"]) == "0:00:00"


def test_progress_is_seen_while_a_call_runs(db: Connection, connect: Connect, declared: Knowledge, rig: Rig) -> None:
    declared(64)
    worker = connect()
    rig.hold(worker.info.backend_pid, 3)
    filling = Filling(worker, batch=8)
    rig.wait_for_encoding(filling.pid, 3)
    assert counts(db) == {"total": 64, "embedded": 16, "pending": 48}
    rig.let_go()
    filling.wait()


@pytest.fixture
def large(db: Connection) -> Connection:
    """200,000 rows on 3,000 pages: of ten one is blank, one pending, and eight are filled."""
    db.execute(
        """create table large (id int primary key, content text, embedding vector(16)) with (autovacuum_enabled = off);
           insert into large select n, case when n % 10 > 0 then 'text ' || n end,
               case when n % 10 > 1 then ('[' || n % 7 + 1 || repeat(',1', 15) || ']')::vector end
           from generate_series(1, 200000) n"""
    )
    db.execute("select embed_column('large', 'content'::name, model => 'stub-16')")
    return db


def test_progress_of_a_large_table_is_estimated(large: Connection) -> None:
    large.execute("analyze large")
    found = progress(large, "large")
    assert (found["exact"], found["pending"]) == (False, 20_000)
    assert found["margin"] == pytest.approx(2 * (0.7 / 1000) ** 0.5, rel=0.1)
    assert found["total"] == pytest.approx(200_000, rel=0.02)
    assert found["embedded"] == pytest.approx(160_000, rel=0.03)
    assert found["blank"] == pytest.approx(20_000, rel=0.15)
    assert progress(large, "large")["margin"] == found["margin"]


def test_statistics_that_the_sample_contradicts_are_not_believed(large: Connection) -> None:
    """Half of the rows are gone, which no vacuum has seen, and what was written since was forgotten in a crash."""
    large.execute("delete from large where id % 2 = 1")
    large.execute("select pg_stat_reset()")
    for wrong in (200_000, 1_000_000):
        large.execute("update pg_class set reltuples = %s where oid = 'large'::regclass", [wrong])
        found = progress(large, "large")
        assert found["total"] == pytest.approx(100_000, rel=0.15)
        assert found["embedded"] == pytest.approx(80_000, rel=0.2)


def test_progress_of_partitions(db: Connection) -> None:
    db.execute("create table parted (id int primary key, content text, embedding vector(384)) partition by hash (id)")
    db.execute("create table part0 partition of parted for values with (modulus 2, remainder 0)")
    db.execute("create table part1 partition of parted for values with (modulus 2, remainder 1)")
    db.execute("insert into parted select g, nullif('text ' || g, 'text 7') from generate_series(1, 20) g")
    db.execute("select embed_column('parted', 'content'::name)")
    fill(db, max_rows=9)
    assert counts(db, "parted") == {"total": 20, "embedded": 9, "pending": 10, "blank": 1}


@pytest.mark.slow
def test_oldest_pending_with_commit_timestamps(own_rig: Callable[..., Rig]) -> None:
    own = own_rig({"track_commit_timestamp": "on"})
    with own.server.connect() as db:
        db.execute("create table knowledge (id int primary key, content text, embedding vector(384))")
        db.execute("select embed_column('knowledge', 'content'::name)")
        db.execute("insert into knowledge values (1, 'old')")
        time.sleep(1)
        db.execute("insert into knowledge values (2, 'new')")
        assert scalar(db, "select oldest_pending between '1 s' and '20 s' from embedding_progress")
        fill(db, max_rows=1)
        assert scalar(db, "select oldest_pending < '20 s' from embedding_progress")


def test_progress_of_anothers_table_that_the_statistics_do_not_know(
    db: Connection, connect: Connect, role: Callable[..., str]
) -> None:
    """Nobody has counted its rows yet: that is not 0 of them."""
    role("viola")
    db.execute(f"grant execute on function {DECLARING} to viola".encode())
    viola = connect("viola")
    viola.execute("create table hers (id int primary key, content text, embedding vector(384))")
    viola.execute("select embed_column('hers', 'content'::name)")
    query = "select embedded, pending, time_left::text, exact from embedding_progress"
    assert rows(db, query) == [(0, 0, "00:00:00", False)]
    viola.execute("insert into hers select g, 'text ' || g from generate_series(1, 3) g")
    viola.execute("select pg_stat_force_next_flush()")
    assert rows(db, query) == [(None, None, None, False)]
    db.execute("select pg_stat_reset()")
    assert scalar(db, "select total from embedding_progress") is None
    assert scalar(db, "select status from embedding_health where check_name = 'schedule'") == "ok"
    viola.execute("analyze hers")
    assert rows(db, f"select total, {query[7:]}") == [(3, 0, 3, None, False)]


def test_progress_of_anothers_partitions(db: Connection, role: Callable[..., str]) -> None:
    """What the statistics have of the parent is what they have of its partitions, once more."""
    db.execute("create table parted (id int primary key, content text, embedding vector(384)) partition by hash (id)")
    db.execute("create table part0 partition of parted for values with (modulus 2, remainder 0)")
    db.execute("create table part1 partition of parted for values with (modulus 2, remainder 1)")
    db.execute("select embed_column('parted', 'content'::name)")
    role("viola")
    for table in ("parted", "part0", "part1"):
        db.execute(f"alter table {table} owner to viola".encode())
    query = "select total, embedded, pending from embedding_progress"
    assert rows(db, query) == [(0, 0, 0)]
    db.execute("insert into parted select g, 'text ' || g from generate_series(1, 20) g; analyze parted")
    assert rows(db, query) == [(20, 0, 20)]


# --- throughput, failures --------------------------------------------------------------------------------------


def test_throughput_adds_up(db: Connection, declared: Knowledge, rig: Rig) -> None:
    declared(texts=["one two three"] * 30 + ["raiseword"] * 2)
    rig.pace(0.02)
    fill(db, batch=8)
    db.execute("alter table knowledge add small vector(16)")
    db.execute("select embed_column('knowledge', 'content'::name, 'small', 'stub-16')")
    fill(db)
    found = rows(
        db,
        "select relation::text, target::text, model, sum(rows), sum(failed), sum(skipped), sum(tokens),"
        " min(rows_per_second) > 0, min(tokens_per_second) > 0, sum(encode_seconds) > 0.02,"
        " sum(claim_seconds) > 0, sum(write_seconds) > 0, count(*) <= 2"
        " from embedding_throughput group by 1, 2, 3 order by 2",
    )
    yes = (True,) * 6
    assert found == [
        ("knowledge", "embedding", "stub-384", 30, 2, 0, 150, *yes),
        ("knowledge", "small", "stub-16", 30, 2, 0, 150, *yes),
    ]


def test_figures_are_as_long_as_they_are_exact(db: Connection, declared: Knowledge) -> None:
    declared(20)
    fill(db, batch=7, max_rows=14)
    for view in ("embedding_progress", "embedding_throughput"):
        (figures,) = rows(db, f"select to_jsonb(v) from {view} v")[0]
        shown = {name: str(value) for name, value in figures.items() if isinstance(value, float)}
        assert {"rows_per_second"} <= shown.keys()
        for name, value in shown.items():
            assert len(value.partition(".")[2]) <= (2 if name.endswith("_per_second") else 3), (name, value)


def test_old_figures_go(db: Connection, declared: Knowledge) -> None:
    declared(5)
    fill(db)
    db.execute("update autoembed.run set finished = now() - interval '2 days'")
    db.execute("insert into knowledge (content) values ('new')")
    fill(db)
    assert scalar(db, "select sum(rows) from embedding_throughput") == 1


def test_failures_name_rows_by_their_key_columns(db: Connection) -> None:
    db.execute('create table pairs ("A 1" int, b text, content text, embedding vector(384), primary key (b, "A 1"))')
    db.execute("insert into pairs values (7, 'x', 'raiseword')")
    db.execute("select embed_column('pairs', 'content'::name)")
    fill(db)
    query = "select relation::text, target::text, key, kind, attempts, next_try > last_try from embedding_failures"
    assert rows(db, query) == [("pairs", "embedding", {"A 1": 7, "b": "x"}, "encoder", 1, True)]
    db.execute('alter table pairs rename column "A 1" to a')
    assert rows(db, "select key from embedding_failures") == [({"a": 7, "b": "x"},)]


# --- set-up ----------------------------------------------------------------------------------------------------


def test_settings_show_their_source(db: Connection, rig: Rig) -> None:
    found = {
        name: (value, source) for name, value, source in rows(db, "select name, value, source from embedding_settings")
    }
    assert found["EMBEDDING_MODEL_NAME"] == ("stub-384", "environment")
    assert found["EMBEDDING_MODEL_DIR"] == (str(rig.models), "environment")
    assert found["EMBEDDING_BATCH_SIZE"] == ("32", "default")


def test_settings_that_are_wrong_are_shown(own_rig: Callable[..., Rig]) -> None:
    own = own_rig()
    own.server.stop()
    own.server.environment["EMBEDDING_BATCH_SIZE"] = "many"
    own.server.start()
    with own.server.connect() as db:
        source = scalar(db, "select source from embedding_settings where name = 'EMBEDDING_BATCH_SIZE'")
    assert source.startswith("invalid: ")


@pytest.fixture
def model(rig: Rig) -> Iterator[str]:
    """A model of the test's own."""
    folder = add_stub(rig.models, "stub-of-one-test")
    yield folder.name
    shutil.rmtree(folder, ignore_errors=True)


def test_models_and_their_status(db: Connection, rig: Rig, model: str) -> None:
    query = (
        "select status, dimensions, max_tokens, architecture, length(fingerprint) from embedding_models where name = %s"
    )
    assert rows(db, query, model) == [("ready", 384, 64, "stub", 64)]
    (rig.models / model / "model.safetensors").unlink()
    assert rows(db, query, model)[0][0].startswith("broken: ")
    (rig.models / model / "autoembed.json").unlink()
    assert rows(db, query, model)[0][:2] == ("unregistered", None)


def test_a_folder_that_the_server_may_not_read_hides_no_model_and_no_column(
    db: Connection, knowledge: Knowledge, rig: Rig, model: str
) -> None:
    knowledge(1)
    db.execute("select embed_column('knowledge', array['content']::name[], model => %s::text)", [model])
    (rig.models / "under-way").mkdir(mode=0)
    try:
        statuses: dict[str, str] = dict(rows(db, "select name, status from embedding_models"))
        assert "Permission denied" in statuses["under-way"]
        assert statuses[model] == "ready"
        assert scalar(db, "select status from embedding_columns") == "ready"
    finally:
        (rig.models / "under-way").rmdir()


def test_columns_and_their_status(db: Connection, knowledge: Knowledge, rig: Rig, model: str) -> None:
    knowledge(1)

    def status() -> str:
        return str(scalar(db, "select status from embedding_columns"))

    db.execute("select embed_column('knowledge', array['content']::name[], model => %s::text)", [model])
    query = (
        "select relation::text, source::text[], target::text, model, mode, enabled, dimensions from embedding_columns"
    )
    assert rows(db, query) == [("knowledge", ["content"], "embedding", model, "deferred", True, 384)]
    assert status() == "ready"
    db.execute("select embed_column_set('knowledge', 'embedding', enabled => false)")
    assert status() == "paused"
    db.execute("select embed_column_set('knowledge', 'embedding', enabled => true)")
    shutil.rmtree(rig.models / model)
    assert status().startswith("model missing")
    add_stub(rig.models, model, weights="others")
    assert status().startswith("model changed")
    db.execute("select embed_column_set('knowledge', 'embedding', model => %s)", [model])
    assert status() == "ready"
    db.execute("alter table knowledge drop constraint knowledge_pkey")
    assert status().startswith("no key")


VIEWS = ("columns", "models", "settings", "progress", "throughput", "failures", "truncations")


def test_views_are_for_everybody_but_rows_are_not(
    db: Connection, connect: Connect, declared: Knowledge, role: Callable[..., str]
) -> None:
    declared(texts=["fine", "raiseword", "word " * 100])
    fill(db)
    stranger = connect(role("viola"))
    found = {view: len(rows(stranger, f"select * from embedding_{view}")) for view in VIEWS}
    assert {view for view, count in found.items() if count} == {"columns", "models", "settings"}


def test_columns_name_their_indexes(db: Connection, declared: Knowledge) -> None:
    """Those of partitions as well: a tool that compares schemas sees each of them."""
    declared(1)
    db.execute("create table parted (id int primary key, content text, embedding vector(384)) partition by range (id)")
    db.execute("create table part partition of parted for values from (0) to (9)")
    db.execute("select embed_column('parted', 'content'::name)")
    for relation in ("knowledge", "parted"):
        db.execute("select embed_index(%s::regclass)", [relation])
    db.execute("create index on part (content)")
    found: dict[str, list[str]] = dict(rows(db, "select relation::text, indexes::text[] from embedding_columns"))
    assert found == {
        "knowledge": ["knowledge_embedding_pending", "knowledge_embedding_hnsw"],
        "parted": ["parted_embedding_pending", "part_least_idx", "parted_embedding_hnsw", "part_embedding_idx"],
    }
