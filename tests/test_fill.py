"""embed_pending: what one call fills, in which order, what it returns, records and says."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from psycopg import errors, sql

from conftest import Database
from support.rigging import Rig, cpu_seconds, fill, leftovers, pending, rows, scalar
from support.server import Connection, Server, pg_config
from support.stubs import add_stub
from support.talk import notices

pytest_plugins = ["support.rig"]

Knowledge = Callable[..., str]
Connect = Callable[..., Connection]


@pytest.fixture
def server(rig: Rig) -> Server:
    return rig.server


def loaded_modules(connection: Connection) -> set[str]:
    """Which of the heavy modules a backend has imported."""
    connection.execute(
        """create or replace function pg_temp.loaded() returns text[] language plpython3u as $$
           import sys
           return [name for name in ("torch", "sentence_transformers") if name in sys.modules]
        $$"""
    )
    return set(scalar(connection, "select pg_temp.loaded()"))


# --- what is filled --------------------------------------------------------------------------------------------


def test_fills_all_and_says_how_many(db: Connection, declared: Knowledge) -> None:
    declared(70)
    assert fill(db) == (70, 0, 0)
    assert pending(db) == 0
    assert fill(db) == (0, 0, 0)
    assert leftovers(db) == {}


def test_empty_queue_loads_no_model(db: Connection, declared: Knowledge, rig: Rig) -> None:
    declared(0, texts=["", " \n\t "])
    assert fill(db) == (0, 0, 0)
    assert rig.encodings() == []
    assert loaded_modules(db) == set()


def test_empty_queue_is_cheap(db: Connection, declared: Knowledge, rig: Rig) -> None:
    declared(0, texts=["", " "])
    fill(db)
    before, used = len(rig.server.log), cpu_seconds(db.info.backend_pid)
    for _ in range(10):
        fill(db)
    assert (cpu_seconds(db.info.backend_pid) - used) / 10 < 0.1
    assert "autoembed:" not in rig.server.log[before:]


@pytest.mark.parametrize("batch", [1, 32, 512])
def test_batch_is_the_unit_of_record(db: Connection, declared: Knowledge, batch: int) -> None:
    declared(70)
    assert fill(db, batch=batch) == (70, 0, 0)
    assert scalar(db, "select max(embedded) from autoembed.run") == min(batch, 70)
    assert scalar(db, "select count(*) from autoembed.run") == -(-70 // batch)


def test_slow_write_holds_the_locks_of_few_rows_at_a_time(db: Connection, declared: Knowledge) -> None:
    """Each of a client's UPDATEs would otherwise wait for the whole batch's."""
    declared(60)
    db.execute("create function slow() returns trigger language plpgsql"
               " as 'begin perform pg_sleep(0.01); return new; end'")  # fmt: skip
    db.execute("create trigger slow before update on knowledge for each row execute function slow()")
    assert fill(db, batch=60) == (60, 0, 0)
    written = [count for (count,) in rows(db, "select count(*) from knowledge group by xmin order by min(id)")]
    assert written[0] == 32
    assert max(written[1:]) * 0.01 <= 0.05
    assert rows(db, "select embedded from autoembed.run") == [(60,)]


def test_batch_of_null_is_the_setting(db: Connection, declared: Knowledge) -> None:
    declared(10)
    db.execute("""do language plpython3u 'import os; os.environ["EMBEDDING_BATCH_SIZE"] = "4"'""")
    assert fill(db, batch=None) == (10, 0, 0)
    assert rows(db, "select embedded from autoembed.run order by finished") == [(4,), (4,), (2,)]


@pytest.mark.parametrize("batch", [0, -1, 513, 100_000])
def test_batch_out_of_range_is_refused(db: Connection, declared: Knowledge, batch: int) -> None:
    declared(1)
    with pytest.raises(errors.InvalidParameterValue, match="batch is") as caught:
        fill(db, batch=batch)
    assert caught.value.diag.message_hint == "batch is 1 to 512."
    assert pending(db) == 1


def test_fills_in_key_order_up_to_max_rows(db: Connection, declared: Knowledge) -> None:
    declared(20)
    assert fill(db, batch=3, max_rows=7) == (7, 0, 0)
    assert rows(db, "select id from knowledge where embedding is not null order by id") == [(n,) for n in range(1, 8)]
    assert fill(db, batch=3, max_rows=0) == (0, 0, 0)
    assert fill(db, batch=3) == (13, 0, 0)


def test_max_seconds_ends_the_call_after_a_batch(db: Connection, declared: Knowledge, rig: Rig) -> None:
    declared(64)
    rig.pace(0.4)
    started = time.monotonic()
    embedded, failed, skipped = fill(db, batch=8, max_seconds=1)
    assert time.monotonic() - started >= 1
    assert 8 <= embedded < 64
    assert (failed, skipped) == (0, 0)
    assert pending(db) == 64 - embedded
    rig.reset()
    assert fill(db, max_seconds=0) == (0, 0, 0)
    assert fill(db)[0] == 64 - embedded


@pytest.mark.parametrize("limit", ["max_rows", "max_seconds"])
def test_negative_limits_are_refused(db: Connection, declared: Knowledge, limit: str) -> None:
    declared(1)
    with pytest.raises(errors.InvalidParameterValue, match=f"{limit} is -1"):
        fill(db, **{limit: -1})


def test_null_and_blank_rows_are_nobodys_work(db: Connection, declared: Knowledge) -> None:
    blanks = ["", " ", "\n\t", " " * 300, " " * 70_000]
    declared(0, texts=["a text", *blanks])
    db.execute("insert into knowledge (content) values (null)")
    assert fill(db) == (1, 0, 0)
    assert pending(db) == len(blanks) + 1
    assert leftovers(db) == {}


def test_two_columns_of_one_table_by_two_models(db: Connection, declared: Knowledge) -> None:
    declared(5)
    db.execute("alter table knowledge add small vector(16)")
    db.execute("select embed_column('knowledge', 'content'::name, 'small', 'stub-16')")
    assert fill(db) == (10, 0, 0)
    assert scalar(db, "select count(*) from knowledge where embedding is null or small is null") == 0


def test_several_sources_are_joined_by_a_newline(db: Connection) -> None:
    db.execute("create table parts (id int primary key, a text, b text, embedding vector(384))")
    db.execute("insert into parts values (1, 'head', 'tail'), (2, null, 'tail'), (3, null, null)")
    db.execute("select embed_column('parts', array['a', 'b']::name[])")
    assert fill(db) == (2, 0, 0)
    assert scalar(db, "select embedding = embed(E'head\\ntail') from parts where id = 1")
    assert scalar(db, "select embedding = embed('tail') from parts where id = 2")


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("k int, primary key (k)", "generate_series(1, 40)"),
        ("k text, primary key (k)", "quote_literal(chr(64 + g)) from generate_series(1, 40) g"),
        ("k uuid, primary key (k)", "gen_random_uuid() from generate_series(1, 40)"),
        ("k timestamptz, primary key (k)", "now() - make_interval(secs => g / 7.0) from generate_series(1, 40) g"),
        ("k int, l text, primary key (l, k)", "g, 'x''\"\\' || g % 3 from generate_series(1, 40) g"),
        ("k numeric not null unique", "g / 7.0 from generate_series(1, 40) g"),
        ('"K 1" varchar(9), primary key ("K 1")', "'Ü' || g from generate_series(1, 40) g"),
    ],
)
def test_any_kind_of_key(db: Connection, key: str, values: str) -> None:
    db.execute(f"create table keyed ({key}, content text default 'a text', embedding vector(384))")
    names = '"K 1"' if "K 1" in key else "k, l" if "l text" in key else "k"
    db.execute(f"insert into keyed ({names}) select {values}")
    db.execute("select embed_column('keyed', 'content'::name)")
    assert fill(db, batch=7) == (40, 0, 0)
    assert pending(db, "keyed") == 0


def test_partitions_are_filled(db: Connection) -> None:
    db.execute("create table parted (id int primary key, content text, embedding vector(384)) partition by hash (id)")
    for n in range(3):
        db.execute(f"create table part{n} partition of parted for values with (modulus 3, remainder {n})")
    db.execute("insert into parted select g, 'text ' || g from generate_series(1, 50) g")
    db.execute("select embed_column('parted', 'content'::name)")
    assert fill(db, batch=16) == (50, 0, 0)
    assert pending(db, "parted") == 0


def test_names_that_need_quoting(db: Connection) -> None:
    db.execute('create schema "My Schema"')
    columns = '"Id" int primary key, "select" text, "d" text, "the ""vector" vector(384)'
    db.execute(f'create table "My Schema"."A \'table" ({columns})')
    db.execute("""insert into "My Schema"."A 'table" values (1, 'one', 'key'), (2, 'two', 'hash')""")
    relation, target = """"My Schema"."A 'table\"""", 'the "vector'
    db.execute("select embed_column(%s::regclass, array['select', 'd']::name[], %s)", [relation, target])
    assert fill(db) == (2, 0, 0)


def test_only_the_named_relation_is_filled(db: Connection, declared: Knowledge) -> None:
    declared(3)
    declared(4, relation="other")
    assert fill(db, relation="other") == (4, 0, 0)
    assert (pending(db), pending(db, "other")) == (3, 0)


def test_relation_that_is_not_declared_is_refused(db: Connection, knowledge: Knowledge) -> None:
    knowledge(1)
    with pytest.raises(errors.UndefinedObject, match="no column declared") as caught:
        fill(db, relation="knowledge")
    assert "embed_column" in (caught.value.diag.message_hint or "")


def test_goes_on_where_another_call_ended(db: Connection, connect: Connect, declared: Knowledge) -> None:
    declared(20)
    assert fill(connect(), max_rows=5) == (5, 0, 0)
    assert fill(db) == (15, 0, 0)
    assert scalar(db, "select sum(embedded) from autoembed.run") == 20


def test_same_text_same_vector(db: Connection, connect: Connect, declared: Knowledge) -> None:
    declared(0, texts=["the same text", "another", "the same text"])
    fill(db, batch=2)
    db.execute("create table first as select * from knowledge")
    db.execute("update knowledge set embedding = null")
    fill(connect(), batch=3)
    assert scalar(db, "select count(*) from first f join knowledge k using (id) where f.embedding = k.embedding") == 3
    assert scalar(db, "select count(distinct embedding) from knowledge") == 2


# --- paused, broken, changed -----------------------------------------------------------------------------------


def test_paused_column_is_left_alone(db: Connection, declared: Knowledge) -> None:
    declared(3)
    db.execute("select embed_column_set('knowledge', 'embedding', enabled => false)")
    assert fill(db) == (0, 0, 0)
    db.execute("select embed_column_set('knowledge', 'embedding', enabled => true)")
    assert fill(db) == (3, 0, 0)


@pytest.fixture
def doomed(rig: Rig) -> Path:
    """A model that the test breaks."""
    number = len(list(rig.models.iterdir()))
    return add_stub(rig.models, f"stub-doomed-{number}")


def test_model_changed_on_disk_stops_the_column(db: Connection, knowledge: Knowledge, doomed: Path) -> None:
    knowledge(3)
    db.execute("select embed_column('knowledge', 'content'::name, model => %s::text)", [doomed.name])
    (doomed / "model.safetensors").write_text("other weights")
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match="changed") as caught:
        fill(db)
    assert caught.value.diag.message_hint
    assert pending(db) == 3
    assert leftovers(db) == {}


def test_model_that_was_replaced_does_not_mix(
    db: Connection, connect: Connect, knowledge: Knowledge, doomed: Path, rig: Rig
) -> None:
    knowledge(6)
    db.execute("select embed_column('knowledge', 'content'::name, model => %s::text)", [doomed.name])
    fill(db, max_rows=3)
    shutil.rmtree(doomed)
    add_stub(rig.models, doomed.name, weights="others")
    for worker in (db, connect()):  # one has the former model loaded
        with pytest.raises(errors.ObjectNotInPrerequisiteState, match="declared with") as caught:
            fill(worker)
        assert "embed_column_set" in (caught.value.diag.message_hint or "")
    assert pending(db) == 3
    db.execute("select embed_column_set('knowledge', 'embedding', model => %s::text)", [doomed.name])
    assert fill(db) == (6, 0, 0)


def test_model_that_is_gone_stops_the_column(db: Connection, knowledge: Knowledge, doomed: Path) -> None:
    knowledge(6)
    db.execute("select embed_column('knowledge', 'content'::name, model => %s::text)", [doomed.name])
    fill(db, max_rows=3)
    shutil.rmtree(doomed)
    with pytest.raises(errors.InvalidParameterValue, match=doomed.name):
        fill(db)
    assert pending(db) == 3


def test_one_broken_model_keeps_no_other_column_waiting(
    db: Connection, declared: Knowledge, knowledge: Knowledge, doomed: Path
) -> None:
    knowledge(2, relation="broken")
    db.execute("select embed_column('broken', 'content'::name, model => %s::text)", [doomed.name])
    declared(3)
    (doomed / "model.safetensors").unlink()
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match=r"broken\.embedding was not filled"):
        fill(db)
    assert (pending(db), pending(db, "broken")) == (0, 2)
    assert leftovers(db) == {}


# --- what is recorded and said ---------------------------------------------------------------------------------


def test_truncated_texts_are_recorded(db: Connection, declared: Knowledge) -> None:
    declared(0, texts=["short", "word " * 100, "word " * 200])
    assert fill(db) == (3, 0, 0)
    found = rows(db, "select key, tokens, token_limit from embedding_truncations order by tokens")
    assert found == [({"id": 2}, 102, 64), ({"id": 3}, 202, 64)]
    db.execute("update knowledge set content = 'short now' where id = 2")
    fill(db)
    assert rows(db, "select key from embedding_truncations") == [({"id": 3},)]


def test_run_holds_rows_tokens_and_seconds(db: Connection, declared: Knowledge, rig: Rig) -> None:
    declared(0, texts=["one two three"] * 16)
    rig.pace(0.05)
    fill(db, batch=8)
    found = rows(
        db,
        "select embedded, failed, skipped, tokens, model, encode_seconds >= 0.05, claim_seconds > 0, write_seconds > 0"
        " from autoembed.run",
    )
    assert found == [(8, 0, 0, 40, "stub-384", True, True, True)] * 2


def test_one_log_line_a_call(db: Connection, declared: Knowledge, rig: Rig) -> None:
    declared(9)
    before = len(rig.server.log)
    fill(db, batch=3)
    lines = [line for line in rig.server.log[before:].splitlines() if "autoembed: 9" in line]
    assert len(lines) == 1
    assert "LOG:  autoembed: 9 rows embedded, 0 failed" in lines[0]
    assert "rows/s" in lines[0]
    assert "stub-384 on cpu" in lines[0]


def test_the_log_names_the_models_of_the_call_and_each_that_is_loaded(
    db: Connection, declared: Knowledge, rig: Rig
) -> None:
    add_stub(rig.models, "stub-beside")
    try:
        before = len(rig.server.log)
        db.execute("select embed('warm', 'stub-beside')")
        declared(9)
        fill(db)
    finally:
        shutil.rmtree(rig.models / "stub-beside")
    logged = rig.server.log[before:]
    (line,) = [line for line in logged.splitlines() if "autoembed: 9" in line]
    assert line.endswith("rows/s), stub-384 on cpu")
    for name in ("stub-beside", "stub-384"):
        assert re.search(rf"autoembed: model {name} loaded on cpu in \d+\.\d s, \d+ MB of weights", logged)


def test_one_row_is_one_row(db: Connection, declared: Knowledge, rig: Rig) -> None:
    declared(2)
    rig.pace(1.1)
    before = len(rig.server.log)
    with notices(db) as heard:
        fill(db, batch=1, max_rows=1)
    assert ": 1 row embedded, 1 to go, " in str(heard[0].message)
    assert "autoembed: 1 row embedded, 0 failed" in rig.server.log[before:]


def test_notices_say_how_far_it_is(db: Connection, declared: Knowledge, rig: Rig) -> None:
    declared(48)
    notices: list[str] = []
    db.add_notice_handler(lambda notice: notices.append(notice.message_primary or ""))
    fill(db, batch=8, max_rows=8)
    assert notices == []
    rig.pace(0.3)
    fill(db, batch=8)
    assert len(notices) == 1
    assert notices[0].startswith("public.knowledge.embedding: ")
    assert "to go" in notices[0]
    assert "rows/s" in notices[0]


def test_a_call_with_no_column_to_fill_says_so(db: Connection, declared: Knowledge) -> None:
    declared(0)
    with notices(db) as heard:
        fill(db)
        assert heard == []
        db.execute("select embed_column_set('knowledge', 'embedding', enabled => false)")
        fill(db)
        fill(db, relation="knowledge")
    assert [notice.severity for notice in heard] == ["NOTICE", "NOTICE"]
    assert "no column of your own is declared for embedding, enabled, and can be filled" in str(heard[0].message)
    assert "no column of this relation" in str(heard[1].message)


# --- the caller's transaction and settings ---------------------------------------------------------------------


def test_inside_a_transaction_it_is_refused_at_once(connect: Connect, db: Connection, declared: Knowledge) -> None:
    declared(3)
    caller = connect(autocommit=False)
    with pytest.raises(errors.InvalidTransactionTermination) as caught:
        fill(caller)
    assert caught.value.sqlstate == "2D000"
    assert "autocommit" in (caught.value.diag.message_hint or "")
    caller.rollback()
    assert leftovers(db) == {}
    assert pending(db) == 3
    caller.autocommit = True
    assert fill(caller) == (3, 0, 0)


SEEN = """
create function seen() returns trigger language plpgsql as $$
begin
    perform set_config('my.seen', current_setting('transaction_isolation'), false);
    return new;
end $$"""


@pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])
def test_isolation_is_restored(db: Connection, declared: Knowledge, isolation: str) -> None:
    declared(3)
    db.execute(SEEN)
    db.execute("create trigger seen before update on knowledge for each row execute function seen()")
    db.execute(sql.SQL("set default_transaction_isolation = {}").format(isolation))
    assert fill(db) == (3, 0, 0)
    assert scalar(db, "select current_setting('my.seen')") == "read committed"
    assert scalar(db, "show default_transaction_isolation") == isolation
    with pytest.raises(errors.InvalidParameterValue):
        fill(db, batch=0)
    assert scalar(db, "show default_transaction_isolation") == isolation
    assert scalar(db, "show transaction_isolation") == isolation


def test_isolation_is_restored_inside_a_transaction(connect: Connect, declared: Knowledge) -> None:
    declared(3)
    caller = connect()
    caller.execute("set default_transaction_isolation = serializable")
    caller.autocommit = False
    with pytest.raises(errors.InvalidTransactionTermination):
        fill(caller)
    caller.rollback()
    assert scalar(caller, "show default_transaction_isolation") == "serializable"


def test_isolation_is_restored_when_a_model_is_broken(db: Connection, knowledge: Knowledge, doomed: Path) -> None:
    knowledge(1)
    db.execute("select embed_column('knowledge', 'content'::name, model => %s::text)", [doomed.name])
    (doomed / "model.safetensors").unlink()
    db.execute("set default_transaction_isolation = serializable")
    with pytest.raises(errors.ObjectNotInPrerequisiteState):
        fill(db)
    assert scalar(db, "show default_transaction_isolation") == "serializable"


SETTINGS = "select name, setting from pg_settings where name !~ '^transaction_' order by name"


def test_no_setting_is_changed(db: Connection, declared: Knowledge) -> None:
    declared(5)
    db.execute("set jit = on")
    db.execute("set synchronous_commit = off")
    db.execute("set search_path = pg_temp, public")
    before = rows(db, SETTINGS)
    fill(db)
    assert rows(db, SETTINGS) == before


def test_works_without_the_interface_on_the_path(db: Connection, declared: Knowledge) -> None:
    declared(5)
    db.execute("set search_path = ''")
    assert db.execute("call public.embed_pending()").fetchone() == (5, 0, 0, 0)


def test_variables_of_plpgsql_take_the_totals(db: Connection, declared: Knowledge) -> None:
    declared(5)
    db.execute("create table totals (e bigint, f bigint, s bigint, c bigint)")
    db.execute(
        """do $$ declare e bigint; f bigint; s bigint; c bigint;
           begin call embed_pending(embedded => e, failed => f, skipped => s, cached => c);
                 insert into totals values (e, f, s, c); end $$"""
    )
    assert rows(db, "select * from totals") == [(5, 0, 0, 0)]


@pytest.mark.slow
def test_on_a_standby_it_says_so(own_rig: Callable[..., Rig], tmp_path: Path) -> None:
    primary = own_rig({"wal_level": "replica", "max_wal_senders": 4}).server
    with primary.connect() as db:
        db.execute("create table t (id int primary key, content text, embedding vector(384))")
        db.execute("select embed_column('t', 'content'::name)")
        db.execute("insert into t values (1, 'a text')")
    standby = Server(tmp_path / "standby", primary.environment, primary.settings)
    standby.directory.mkdir()
    backup = [str(pg_config("--bindir") / "pg_basebackup"), "-d", primary.dsn("postgres"), "--checkpoint=fast"]
    subprocess.run([*backup, "--write-recovery-conf", "-D", str(standby.directory / "data")], check=True)
    standby.start()
    try:
        with standby.connect() as db:
            assert scalar(db, "select count(*) from embedding_health where message !~ 'could not be made'") == 10
            with pytest.raises(errors.ReadOnlySqlTransaction, match="standby") as caught:
                fill(db)
    finally:
        standby.destroy()
    assert caught.value.diag.message_hint == "Run it on the primary."


def test_a_fresh_database_of_another_schema(server: Server, database: Database, connect: Connect) -> None:
    admin = connect()
    admin.execute("drop extension pg_autoembed")
    admin.execute("drop extension vector")
    admin.execute('create schema "Vec"; create schema tools')
    admin.execute('create extension vector schema "Vec"')
    admin.execute("create extension pg_autoembed schema tools")
    admin.execute('create table plain (id int primary key, content text, embedding "Vec".vector(384))')
    admin.execute("insert into plain values (1, 'a text')")
    admin.execute("select tools.embed_column('plain', 'content'::name)")
    assert admin.execute("call tools.embed_pending()").fetchone() == (1, 0, 0, 0)
