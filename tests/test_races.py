"""Several workers, and what others do to the rows, the table and the column while vectors are computed."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from support.rigging import Filling, Rig, fill, leftovers, pending, rows, scalar
from support.server import Connection, Server, wait_until

pytest_plugins = ["support.rig"]

Knowledge = Callable[..., str]
Connect = Callable[..., Connection]

WRONG = "select count(*) from {} where embedding is distinct from embed(content, {})"


@pytest.fixture
def server(rig: Rig) -> Server:
    return rig.server


def assert_right(db: Connection, relation: str = "knowledge", model: str = "stub-384") -> None:
    """Each row has its own text's vector, of this model."""
    assert scalar(db, WRONG.format(relation, f"'{model}'")) == 0


def count_writes(db: Connection) -> None:
    db.execute("create table writes (id bigint)")
    db.execute(
        """create function count_write() returns trigger language plpgsql as
           'begin insert into writes values (new.id); return null; end'"""
    )
    db.execute("create trigger count_write after update on knowledge for each row execute function count_write()")


# --- several workers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_share_without_loss_or_double(
    db: Connection, connect: Connect, declared: Knowledge, rig: Rig, workers: int
) -> None:
    declared(200)
    count_writes(db)
    connections = [connect() for _ in range(workers)]
    for connection in connections:
        connection.execute("select embed('warm')")
    rig.reset()
    rig.pace(0.01)
    before = len(rig.server.log)
    fillings = [Filling(connection, batch=8) for connection in connections]
    results = [filling.result for filling in fillings]

    assert sum(embedded for embedded, _, _ in results) == 200
    assert {(failed, skipped) for _, failed, skipped in results} == {(0, 0)}
    assert all(embedded for embedded, _, _ in results)
    assert rows(db, "select id from writes group by id having count(*) > 1") == []
    assert sum(texts for _, texts in rig.encodings()) == 200
    assert leftovers(db) == {}
    assert_right(db)
    lost = [int(count) for count in re.findall(r"(\d+) left to other workers", rig.server.log[before:])]
    assert len(lost) == workers
    assert sum(lost) < 200 * workers


def test_worker_leaves_claimed_rows_alone(db: Connection, connect: Connect, declared: Knowledge, rig: Rig) -> None:
    declared(100)
    with rig.encoding(connect(), batch=32) as first:
        assert fill(db, batch=32) == (68, 0, 0)
        assert not first.done
        assert rows(db, "select min(id), max(id) from knowledge where embedding is null") == [(1, 32)]
    assert first.result == (32, 0, 0)
    assert_right(db)


def test_locks_are_those_of_the_batch(db: Connection, connect: Connect, declared: Knowledge, rig: Rig) -> None:
    declared(600)
    query = "select count(*) from pg_locks where locktype = 'advisory' and pid = %s"
    with rig.encoding(connect(), batch=512) as filling:
        assert scalar(db, query, filling.pid) == 514  # the rows, the flight, the air
    assert leftovers(db) == {}


# --- while the encoder runs ------------------------------------------------------------------------------------


def test_encoding_holds_nothing(db: Connection, connect: Connect, declared: Knowledge, rig: Rig) -> None:
    declared(20)
    with rig.encoding(connect()) as filling:
        activity = "select state, backend_xmin, backend_xid, wait_event_type from pg_stat_activity where pid = %s"
        assert rows(db, activity, filling.pid) == [("active", None, None, None)]
        kinds = "select distinct locktype from pg_locks where pid = %s order by 1"
        assert rows(db, kinds, filling.pid) in ([("advisory",)], [("advisory",), ("virtualxid",)])
    assert filling.result == (20, 0, 0)


def test_later_batches_hold_nothing_either(db: Connection, connect: Connect, declared: Knowledge, rig: Rig) -> None:
    declared(64)
    worker = connect()
    rig.hold(worker.info.backend_pid)
    filling = Filling(worker, batch=8)
    activity = "select state, backend_xmin, backend_xid from pg_stat_activity where pid = %s"
    for batch in range(1, 4):
        rig.wait_for_encoding(filling.pid, batch)
        assert rows(db, activity, filling.pid) == [("active", None, None)]
        assert pending(db) == 64 - 8 * (batch - 1)
        rig.hold(filling.pid, batch + 1)
    rig.let_go()
    assert filling.result == (64, 0, 0)


def test_nobody_waits_for_the_encoder(db: Connection, connect: Connect, declared: Knowledge, rig: Rig) -> None:
    declared(20)
    db.execute("set lock_timeout = '200ms'")
    with rig.encoding(connect()):
        db.execute("update knowledge set content = 'changed' where id = 1")
        db.execute("alter table knowledge add note text")
        db.execute("vacuum full knowledge")
        db.execute("reindex table knowledge")
    assert_right(db)


Race = Callable[[Connection], object]


def execute(*statements: str) -> Race:
    return lambda db: [db.execute(statement) for statement in statements]


@pytest.mark.parametrize(
    "race",
    [
        execute("update knowledge set content = 'changed' where id in (1, 4, 16)"),
        execute("update knowledge set content = 'b' where id = 4", "update knowledge set content = 'c' where id = 4"),
        execute("update knowledge set content = content || '!'"),
        execute("update knowledge set note = 'other column'"),
        execute("delete from knowledge where id in (1, 4, 16)"),
        execute("delete from knowledge"),
        execute("truncate knowledge"),
        execute("truncate knowledge restart identity", "insert into knowledge (content) values ('new'), ('rows')"),
        execute("delete from knowledge where id = 4", "insert into knowledge (id, content) values (4, 'another')"),
        execute("update knowledge set id = id + 1000 where id in (1, 4, 16)"),
        execute("update knowledge set id = -id where id in (1, 4, 16)"),
        execute(
            "update knowledge set id = 1000 where id = 1",
            "update knowledge set id = 1 where id = 2",
            "update knowledge set id = 2 where id = 1000",
        ),
        execute("insert into knowledge (content) select 'late ' || g from generate_series(1, 40) g"),
        execute("alter table knowledge rename to moved", "create view knowledge as select * from moved"),
        execute("create schema away", "alter table knowledge set schema away", "set search_path = public, away"),
        execute("alter table knowledge rename column note to remark"),
        execute("alter table knowledge alter id type integer"),
    ],
    ids=[
        "updated", "updated-twice", "all-updated", "other-column", "deleted", "all-deleted", "truncated",
        "truncated-and-new", "deleted-and-new", "re-keyed-up", "re-keyed-down", "swapped", "inserted", "table-renamed",
        "schema-changed", "column-renamed", "key-type",
    ],
)  # fmt: skip
def test_rows_and_tables_that_change_meanwhile(
    db: Connection, connect: Connect, declared: Knowledge, rig: Rig, race: Race
) -> None:
    declared(40)
    db.execute("alter table knowledge alter id set generated by default, add note text")
    with rig.encoding(connect(), batch=16) as filling:
        race(db)
    assert filling.result[1] == 0
    fill(db)
    assert_right(db)
    assert leftovers(db) == {}


@pytest.mark.parametrize(
    "renaming",
    [
        "alter table knowledge rename column content to body",
        "alter table knowledge rename column embedding to vec",
        "alter table knowledge rename column id to number",
    ],
    ids=["source", "target", "key"],
)
def test_declared_columns_renamed_meanwhile(
    db: Connection, connect: Connect, declared: Knowledge, rig: Rig, renaming: str
) -> None:
    declared(40)
    with rig.encoding(connect(), batch=16) as filling:
        db.execute(renaming)
    assert filling.result[1] == 0
    fill(db)
    names = [name for (name,) in rows(db, "select attname from pg_attribute where attrelid = 'knowledge'::regclass")]
    source, target = "body" if "body" in names else "content", "vec" if "vec" in names else "embedding"
    assert scalar(db, f"select count(*) from knowledge where {target} is distinct from embed({source})") == 0
    assert leftovers(db) == {}


def test_vector_of_a_writer_is_kept(db: Connection, connect: Connect, declared: Knowledge, rig: Rig) -> None:
    declared(20)
    db.execute("select embed_column_set('knowledge', 'embedding', writes => 'anyone')")
    with rig.encoding(connect()) as filling:
        db.execute("update knowledge set embedding = embed('mine') where id = 3")
    assert filling.result == (19, 0, 1)
    assert scalar(db, "select embedding = embed('mine') from knowledge where id = 3")


@pytest.mark.parametrize("gone", ["null", "''", "'  '"])
def test_text_that_goes_meanwhile(db: Connection, connect: Connect, declared: Knowledge, rig: Rig, gone: str) -> None:
    declared(20)
    with rig.encoding(connect()) as filling:
        db.execute(f"update knowledge set content = {gone} where id = 3")
    assert filling.result == (19, 0, 1)
    assert rows(db, "select id from knowledge where embedding is null") == [(3,)]
    assert leftovers(db) == {}


def test_locked_row_is_left_for_later(db: Connection, connect: Connect, declared: Knowledge, rig: Rig) -> None:
    declared(20)
    holder = connect(autocommit=False)
    with rig.encoding(connect()) as filling:
        holder.execute("select from knowledge where id in (3, 4) for update")
    embedded, failed, skipped = filling.result
    assert (embedded, failed) == (18, 0)
    assert skipped >= 2
    assert rows(db, "select id from knowledge where embedding is null order by id") == [(3,), (4,)]
    holder.rollback()
    assert fill(db) == (2, 0, 0)
    assert_right(db)


def test_update_under_way_is_not_overwritten(db: Connection, connect: Connect, declared: Knowledge, rig: Rig) -> None:
    declared(20)
    writer = connect(autocommit=False)
    with rig.encoding(connect()) as filling:
        writer.execute("update knowledge set content = 'not yet committed' where id = 3")
    assert filling.result[0] == 19
    writer.commit()
    assert fill(db) == (1, 0, 0)
    assert_right(db)


def test_parent_of_a_new_child_is_written(db: Connection, connect: Connect, declared: Knowledge, rig: Rig) -> None:
    declared(20)
    db.execute("create table child (parent bigint references knowledge)")
    holder = connect(autocommit=False)
    with rig.encoding(connect()) as filling:
        holder.execute("insert into child values (3)")
    assert filling.result == (20, 0, 0)
    holder.commit()


# --- the column and the table ----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [8, 64])
def test_models_never_mix(db: Connection, connect: Connect, declared: Knowledge, rig: Rig, batch: int) -> None:
    declared(64)
    with rig.encoding(connect(), batch=batch) as filling:
        db.execute("select embed_column_set('knowledge', 'embedding', model => 'stub-other')")
    assert filling.future.exception() is None or isinstance(filling.future.exception(), psycopg.Error)
    fill(db)
    assert_right(db, model="stub-other")
    assert leftovers(db) == {}


def test_models_never_mix_when_declared_anew(db: Connection, connect: Connect, declared: Knowledge, rig: Rig) -> None:
    declared(64)
    with rig.encoding(connect(), batch=8):
        db.execute("select embed_column_drop('knowledge')")
        db.execute("select embed_column('knowledge', 'content'::name, model => 'stub-other')")
    fill(db)
    assert_right(db, model="stub-other")
    assert leftovers(db) == {}


def test_other_sources_meanwhile(db: Connection, connect: Connect, declared: Knowledge, rig: Rig) -> None:
    declared(40)
    db.execute("alter table knowledge add title text default 'a title'")
    with rig.encoding(connect(), batch=8):
        db.execute("select embed_column_drop('knowledge')")
        db.execute("select embed_column('knowledge', array['title', 'content']::name[])")
    fill(db)
    assert scalar(db, "select count(*) from knowledge where embedding <> embed(title || E'\\n' || content)") == 0
    assert leftovers(db) == {}


def test_column_paused_meanwhile(db: Connection, connect: Connect, declared: Knowledge, rig: Rig) -> None:
    declared(40)
    with rig.encoding(connect(), batch=8) as filling:
        db.execute("select embed_column_set('knowledge', 'embedding', enabled => false)")
    assert filling.result[0] <= 8
    assert pending(db) >= 32
    assert leftovers(db) == {}


@pytest.mark.parametrize(
    "ending",
    [
        "drop table knowledge",
        "alter table knowledge drop column embedding cascade",
        "alter table knowledge drop column content cascade",
        "select embed_column_drop('knowledge')",
    ],
    ids=["table", "target", "source", "declaration"],
)
def test_dropped_meanwhile(db: Connection, connect: Connect, declared: Knowledge, rig: Rig, ending: str) -> None:
    declared(40)
    declared(30, relation="other")
    with rig.encoding(connect(), batch=8) as filling:
        db.execute(ending)
    assert filling.result == (30, 0, 8)
    assert leftovers(db) == {}


def test_key_dropped_meanwhile(db: Connection, connect: Connect, declared: Knowledge, rig: Rig) -> None:
    declared(40)
    with rig.encoding(connect(), batch=8) as filling:
        db.execute("alter table knowledge drop constraint knowledge_pkey")
    filling.wait()
    assert fill(db) == (0, 0, 0)
    assert scalar(db, "select status from embedding_columns").startswith("no key")
    assert leftovers(db) == {}


def test_another_table_of_that_name_is_not_touched(
    db: Connection, connect: Connect, declared: Knowledge, rig: Rig
) -> None:
    declared(20)
    with rig.encoding(connect(), batch=8) as filling:
        db.execute("create table twin (like knowledge including all)")
        db.execute("insert into twin (content) select content from knowledge")
        db.execute("drop table knowledge")
        db.execute("alter table twin rename to knowledge")
    assert filling.result == (0, 0, 8)
    assert pending(db) == 20
    assert leftovers(db) == {}


def test_table_given_away_meanwhile(
    db: Connection, connect: Connect, declared: Knowledge, rig: Rig, role: Callable[..., str]
) -> None:
    declared(20)
    role("heir")
    with rig.encoding(connect(), batch=8) as filling:
        db.execute("alter table knowledge owner to heir")
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="superuser does not fill"):
        filling.result  # noqa: B018
    assert pending(db) == 20
    assert leftovers(db) == {}


def test_extension_dropped_meanwhile(db: Connection, connect: Connect, declared: Knowledge, rig: Rig) -> None:
    declared(20)
    with rig.encoding(connect(), batch=8) as filling:
        db.execute("drop extension pg_autoembed")
    with pytest.raises(psycopg.Error):
        filling.result  # noqa: B018
    held = "select count(*) from pg_locks where locktype = 'advisory' and pid = %s"
    assert scalar(db, held, filling.pid) == 0


# --- the declaration is changed ----------------------------------------------------------------------------------

CHANGES = {
    "declare": "embed_column('knowledge', 'content'::name)",
    "declare anew": "embed_column('knowledge', 'content'::name, if_not_exists => true)",
    "mode": "embed_column_set('knowledge', 'embedding', mode => 'immediate')",
    "pause": "embed_column_set('knowledge', 'embedding', enabled => false)",
    "drop": "embed_column_drop('knowledge')",
}
WAITS = "select exists (select from pg_locks where pid = %s and not granted)"


@pytest.mark.parametrize("change", CHANGES)
def test_change_waits_for_a_reader_that_writes(
    db: Connection, connect: Connect, knowledge: Knowledge, change: str
) -> None:
    """A lock made stronger midway would wait for the reader, who then waits as a writer: 40P01 for one of them."""
    knowledge(1)
    if change != "declare":
        db.execute("select embed_column('knowledge', 'content'::name)")
    if change == "declare anew":
        db.execute("drop index knowledge_embedding_pending")
    changer = connect()
    changer.execute("select embed('warm')")
    db.execute("begin")
    db.execute("select 1 from knowledge")
    with ThreadPoolExecutor(1) as pool:
        changing = pool.submit(changer.execute, f"select {CHANGES[change]}")
        with connect() as watcher:
            wait_until(lambda: scalar(watcher, WAITS, changer.info.backend_pid))
        db.execute("update knowledge set content = 'written'")
        db.execute("commit")
        changing.result(timeout=60)
    assert scalar(db, "select content from knowledge") == "written"


def test_declaring_once_more_waits_for_nobody(db: Connection, connect: Connect, declared: Knowledge) -> None:
    declared(1)
    db.execute("begin")
    db.execute("update knowledge set content = 'written'")
    other = connect()
    other.execute("set lock_timeout = 1")
    other.execute("select embed_column('knowledge', 'content'::name, if_not_exists => true)")
    db.execute("commit")


BROKEN = "select count(*) from pg_index where indrelid = 'knowledge'::regclass and not indisvalid"


@pytest.mark.parametrize("is_valid", [True, False])
def test_reindex_that_was_broken_off(db: Connection, connect: Connect, declared: Knowledge, is_valid: bool) -> None:
    """The index that it leaves behind goes with the declaration; one of the user's own stays."""
    declared(1)
    db.execute("create index own on knowledge (id) where embedding is null")
    if not is_valid:
        db.execute("update pg_index set indisvalid = false where indexrelid = 'own'::regclass")
    db.execute("begin")
    db.execute("update knowledge set content = 'written'")
    indexer = connect()
    with ThreadPoolExecutor(1) as pool, connect() as watcher:
        reindexing = pool.submit(indexer.execute, "reindex index concurrently knowledge_embedding_pending")
        wait_until(
            lambda: scalar(watcher, WAITS, indexer.info.backend_pid) and scalar(watcher, BROKEN) > (not is_valid)
        )
        watcher.execute("select pg_cancel_backend(%s)", [indexer.info.backend_pid])
        with pytest.raises(psycopg.errors.QueryCanceled):
            reindexing.result(timeout=60)
    db.execute("commit")
    db.execute("select embed_column_drop('knowledge')")
    left = [name for (name,) in rows(db, "select indexname from pg_indexes where tablename = 'knowledge' order by 1")]
    assert left == ["knowledge_pkey", "own"]
