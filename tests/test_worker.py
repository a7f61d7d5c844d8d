"""embed_worker: what it fills by itself, how it sleeps, how it ends; embed_wait."""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psycopg
import pytest
from psycopg import errors, sql

from support.rigging import Rig, cpu_seconds, holds_nothing, leftovers, pending, rows, scalar
from support.server import Connection, Server, wait_until
from support.stubs import add_stub
from support.talk import notices

pytest_plugins = ["support.rig"]

Knowledge = Callable[..., str]
Connect = Callable[..., Connection]
PLACES = "select count(*) from pg_locks where locktype = 'advisory' and pid = %s"


@pytest.fixture
def server(rig: Rig) -> Server:
    return rig.server


class Working:
    """embed_worker in a thread of its own."""

    def __init__(self, connection: Connection, **options: object) -> None:
        self.connection = connection
        self.pid = connection.info.backend_pid
        self.error: Exception | None = None
        arguments = sql.SQL(", ").join(sql.SQL("{} => {}").format(sql.Identifier(k), v) for k, v in options.items())
        self.call = sql.SQL("call embed_worker({})").format(arguments)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.connection.execute(self.call)
        except psycopg.Error as error:
            self.error = error

    @property
    def done(self) -> bool:
        return not self.thread.is_alive()

    def wait(self) -> None:
        self.thread.join(timeout=30)
        assert self.done


@contextmanager
def working(db: Connection, connection: Connection, **options: object) -> Iterator[Working]:
    """While the block runs, a worker is at its place."""
    worker = Working(connection, **options)
    wait_until(lambda: worker.done or scalar(db, PLACES, worker.pid))
    try:
        yield worker
    finally:
        if not worker.done:
            db.execute("select pg_terminate_backend(%s)", [worker.pid])
        worker.thread.join(timeout=30)


def wait_for(db: Connection, relation: str = "knowledge", timeout: str = "20 s") -> None:
    db.execute("call embed_wait(%s::regclass, %s)", [relation, timeout])


def look_at_all(db: Connection) -> None:
    """Until the worker has been at each of its columns once more."""
    for _ in range(2):
        db.execute("insert into knowledge (content) values ('one more')")
        wait_for(db)


# --- what it notices -----------------------------------------------------------------------------------------------


def test_fills_what_is_there_and_what_comes(db: Connection, connect: Connect, declared: Knowledge) -> None:
    declared(20)
    with working(db, connect()):
        wait_for(db)
        assert pending(db) == 0
        for _ in range(3):
            db.execute("insert into knowledge (content) values ('one more')")
            wait_for(db)
            assert pending(db) == 0
        db.execute("update knowledge set content = 'another text' where id = 1")
        wait_for(db)
        assert pending(db) == 0


def test_notices_declarations_pauses_and_drops(
    db: Connection, connect: Connect, knowledge: Knowledge, declared: Knowledge
) -> None:
    knowledge(2, relation="late")
    knowledge(2, relation="gone")
    declared(2)
    with working(db, connect()) as worker:
        wait_for(db)
        db.execute("select embed_column('late', 'content'::name), embed_column('gone', 'content'::name)")
        wait_for(db, "late")
        wait_for(db, "gone")
        db.execute("select embed_column_set('late', 'embedding', enabled => false)")
        db.execute("insert into late (content) values ('while paused')")
        db.execute("alter table gone drop column embedding cascade")
        look_at_all(db)
        db.execute("drop table knowledge")
        assert pending(db, "late") == 1
        db.execute("select embed_column_set('late', 'embedding', enabled => true)")
        wait_for(db, "late")
        assert not worker.done


def test_one_broken_model_keeps_no_other_column_waiting(
    db: Connection, connect: Connect, knowledge: Knowledge, rig: Rig
) -> None:
    folder = add_stub(rig.models, "stub-fading")
    knowledge(2, relation="fading")
    knowledge(2)
    db.execute("select embed_column('fading', 'content'::name, model => 'stub-fading')")
    db.execute("select embed_column('knowledge', 'content'::name)")
    (folder / "model.safetensors").write_text("other weights")
    connection = connect()
    with notices(connection) as heard, working(db, connection) as worker:
        wait_for(db)
        look_at_all(db)
        assert not worker.done
        assert pending(db, "fading") == 2
    assert [n.severity for n in heard if "fading" in str(n.message)] == ["WARNING"]


@pytest.mark.parametrize("mode", ["share", "access exclusive"])
def test_locked_table_keeps_no_other_waiting(
    db: Connection, connect: Connect, knowledge: Knowledge, declared: Knowledge, mode: str
) -> None:
    """An index that is built for hours, or VACUUM FULL."""
    declared(2)
    knowledge(2, relation="held")
    db.execute("select embed_column('held', 'content'::name)")
    holder = connect()
    with holder.transaction():
        holder.execute(f"lock table held in {mode} mode".encode())
        with working(db, connect()) as worker:
            wait_for(db)
            db.execute("insert into knowledge (content) values ('one more')")
            wait_for(db)
            assert not worker.done
    assert (pending(db), pending(db, "held")) == (0, 2)


def test_failing_rows_do_not_keep_it_busy(db: Connection, connect: Connect, declared: Knowledge, rig: Rig) -> None:
    declared(0, texts=["a raiseword text", "a fine text"])
    with working(db, connect()) as worker:
        wait_until(lambda: pending(db) == 1)
        wait_until(lambda: holds_nothing(db, worker.pid))
        encoded = len(rig.encodings())
        for number in range(3):
            db.execute("insert into knowledge (content) values ('behind a failing row ' || %s)", [number])
            wait_until(lambda: pending(db) == 1)
        assert len(rig.encodings()) == encoded + 3


def test_resting_column_notices_what_is_new(db: Connection, connect: Connect, declared: Knowledge, rig: Rig) -> None:
    """Rows that somebody holds are encoded in vain: then the column rests, but not for rows that come meanwhile."""
    declared(16)
    holder, writer = connect(), connect()
    rig.pace(0.5)
    with holder.transaction():
        holder.execute("select from knowledge for update")
        with working(db, connect(), batch=8) as worker, writer.transaction():
            writer.execute("insert into knowledge (content) values ('not yet there')")
            rig.wait_for_encoding(worker.pid, 4)  # twice all of them: more than a second in vain
            time.sleep(2)
            encoded = len(rig.encodings())
            time.sleep(1)
            assert len(rig.encodings()) == encoded
            rig.pace(0)
            db.execute("insert into knowledge (content) values ('new')")
            wait_until(lambda: pending(db) == 16, timeout=3)


def test_short_calls_come_round_to_each_row(db: Connection, connect: Connect, declared: Knowledge) -> None:
    """Also where all that a call has time for is held by somebody."""
    declared(24)
    holder = connect()
    with holder.transaction():
        holder.execute("select from knowledge where id <= 16 for update")
        assert rows(db, "call embed_pending(batch => 8, max_rows => 16)") == [(0, 0, 16, 0)]
        assert rows(db, "call embed_pending(batch => 8, max_rows => 16)") == [(8, 0, 8, 0)]
    assert rows(db, "call embed_pending()") == [(16, 0, 0, 0)]


# --- how it sleeps -------------------------------------------------------------------------------------------------


def test_asleep_it_holds_nothing(db: Connection, connect: Connect, declared: Knowledge) -> None:
    """Vacuum removes what was deleted meanwhile."""
    declared(5)
    with working(db, connect()) as worker:
        wait_for(db)
        wait_until(lambda: holds_nothing(db, worker.pid))
        assert rows(db, "select mode from pg_locks where locktype = 'relation' and pid = %s", worker.pid) == []
        db.execute("delete from knowledge")
        with notices(db) as heard:
            db.execute("vacuum verbose knowledge")
        assert (
            "5 removed" in " ".join(str(n.message) for n in heard)
            or scalar(db, "select pg_relation_size('knowledge')") == 0
        )


def test_asleep_it_costs_little(db: Connection, connect: Connect, declared: Knowledge) -> None:
    declared(5)
    with working(db, connect()) as worker:
        wait_for(db)
        time.sleep(1)
        before = cpu_seconds(worker.pid)
        time.sleep(1)
        assert cpu_seconds(worker.pid) - before < 0.1


def test_without_work_it_imports_no_model(db: Connection, connect: Connect, declared: Knowledge) -> None:
    declared(0, texts=["", " "])
    connection = connect()
    connection.execute("call embed_worker(max_seconds => 1)")
    connection.execute(
        """create function pg_temp.loaded() returns text[] language plpython3u as $$
           import sys
           return [m for m in ("torch", "numpy", "orjson", "sentence_transformers", "tokenizers") if m in sys.modules]
        $$"""
    )
    assert scalar(connection, "select pg_temp.loaded()") == []


# --- how it ends ---------------------------------------------------------------------------------------------------


def test_ends_in_time_and_returns_totals(db: Connection, declared: Knowledge) -> None:
    declared(7)
    started = time.monotonic()
    assert rows(db, "call embed_worker(max_seconds => 1)") == [(7, 0, 0, 0)]
    assert time.monotonic() - started >= 1
    assert leftovers(db) == {}


@pytest.mark.parametrize("function", ["pg_cancel_backend", "pg_terminate_backend"])
def test_asleep_it_reacts(db: Connection, connect: Connect, declared: Knowledge, function: str) -> None:
    declared(2)
    connection = connect()
    with working(db, connection) as worker:
        wait_for(db)
        wait_until(lambda: holds_nothing(db, worker.pid))
        db.execute(f"select {function}(%s)".encode(), [worker.pid])
        worker.wait()
        assert isinstance(worker.error, (errors.QueryCanceled, errors.AdminShutdown))
    assert leftovers(db) == {}
    if function == "pg_cancel_backend":
        assert rows(connection, "call embed_worker(max_seconds => 0)") == [(0, 0, 0, 0)]
        assert scalar(connection, "show default_transaction_isolation") == "read committed"


def test_fast_shutdown_does_not_wait_for_it(own_rig: Callable[..., Rig]) -> None:
    rig = own_rig()
    with rig.server.connect() as db:
        db.execute("create table docs (id int primary key, content text, embedding vector(384))")
        db.execute("select embed_column('docs', 'content'::name)")
        worker = Working(rig.server.connect())
        wait_until(lambda: scalar(db, PLACES, worker.pid))
    rig.server.stop()
    worker.wait()
    log = rig.server.log
    assert "received fast shutdown request" in log
    assert "database system is shut down" in log


# --- how many ------------------------------------------------------------------------------------------------------


def test_second_worker_returns_at_once(db: Connection, connect: Connect, declared: Knowledge) -> None:
    declared(1)
    with working(db, connect()):
        other = connect()
        other.execute("set statement_timeout = '30s'")
        with notices(other) as heard:
            other.execute("call embed_worker()")
        assert [n.severity for n in heard] == ["NOTICE"]
        with working(db, other, workers=2), notices(db) as heard:
            db.execute("call embed_worker(workers => 2)")
            assert [n.severity for n in heard] == ["NOTICE"]


def test_each_role_has_a_worker_of_its_own(
    db: Connection, connect: Connect, declared: Knowledge, role: Callable[..., str]
) -> None:
    declared(1)
    role("alice")
    db.execute("grant execute on procedure embed_worker to alice; grant all on schema public to alice")
    alice = connect("alice")
    alice.execute("create table public.hers (id int primary key, content text, embedding vector(384))")
    for sources in ("name", "name[]"):
        function = f"embed_column(regclass, {sources}, name, text, text, boolean, text, boolean, boolean, name, text)"
        db.execute(f"grant execute on function {function} to alice".encode())
    alice.execute("select embed_column('hers', 'content'::name)")
    alice.execute("insert into hers values (1, 'a text')")
    with working(db, connect()):
        look_at_all(db)
        assert pending(db, "hers") == 1  # not the superuser's
        with working(db, connect("alice")):
            wait_until(lambda: pending(db, "hers") == 0)
    db.execute("drop owned by alice cascade")


def test_role_whose_name_needs_quotes(db: Connection) -> None:
    db.execute("""create role "Alice.B"; grant execute on procedure embed_worker to "Alice.B"; set role "Alice.B" """)
    try:
        assert rows(db, "call embed_worker(max_seconds => 0)") == [(0, 0, 0, 0)]
    finally:
        db.execute("""reset role; drop owned by "Alice.B"; drop role "Alice.B" """)


def test_cancel_as_it_takes_its_place_leaves_no_lock(db: Connection, connect: Connect) -> None:
    """In a pooled session, the lock would keep all of the role's workers away."""
    body = str(scalar(db, "select prosrc from pg_proc where oid = 'autoembed.take_place(bigint[])'::regprocedure"))
    slow = body.replace("return place;", "perform pg_sleep(20); return place;")
    assert slow != body
    create = "create or replace function autoembed.take_place(places bigint[]) returns bigint language plpgsql as"
    db.execute(f"{create} $body${slow}$body$".encode())
    connection = connect()
    with working(db, connection, workers=3) as worker:
        db.execute("select pg_cancel_backend(%s)", [worker.pid])
        worker.wait()
    assert isinstance(worker.error, errors.QueryCanceled)
    assert scalar(db, PLACES, worker.pid) == 0
    assert scalar(connection, "show default_transaction_isolation") == "read committed"


@pytest.mark.parametrize(
    "arguments", ["batch => 0", "max_seconds => -1", "workers => 0", "workers => 65", "workers => null"]
)
def test_arguments_out_of_range_are_refused(db: Connection, arguments: str) -> None:
    with pytest.raises(errors.InvalidParameterValue):
        db.execute(f"call embed_worker({arguments})".encode())


def test_not_inside_a_transaction_block(connect: Connect, declared: Knowledge) -> None:
    declared(1)
    connection = connect(autocommit=False)
    with pytest.raises(errors.InvalidTransactionTermination, match="embed_worker"):
        connection.execute("call embed_worker()")


# --- embed_wait ----------------------------------------------------------------------------------------------------


def test_wait_ends_when_time_is_up(db: Connection, declared: Knowledge) -> None:
    declared(2)
    db.execute("set statement_timeout = '30s'")
    started = time.monotonic()
    with pytest.raises(errors.QueryCanceled, match="still pending") as caught:
        db.execute("call embed_wait('knowledge', '300 ms')")
    assert time.monotonic() - started >= 0.3
    assert "embed_schedule" in str(caught.value.diag.message_hint)


def test_wait_says_at_once_that_rows_have_failed(db: Connection, declared: Knowledge) -> None:
    declared(0, texts=["a raiseword text", "a fine text", " " * 300])
    db.execute("call embed_pending()")
    with pytest.raises(errors.QueryCanceled, match="still pending"):  # it will be tried again
        db.execute("call embed_wait('knowledge', '0')")
    db.execute("update autoembed.failure set next_try = null")
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match="not tried again: 1"):
        db.execute("call embed_wait('knowledge', '1 minute')")
    db.execute("update knowledge set content = 'a good text' where content like '%raise%'")
    with pytest.raises(errors.QueryCanceled, match="still pending"):
        db.execute("call embed_wait('knowledge', '0')")
    db.execute("call embed_pending()")
    db.execute("call embed_wait('knowledge', '0')")


def test_wait_says_what_is_left_and_why(db: Connection, declared: Knowledge, rig: Rig) -> None:
    def complaint() -> str:
        with pytest.raises(errors.QueryCanceled, match="still pending") as caught:
            db.execute("call embed_wait('knowledge', '0')")
        return str(caught.value.diag.message_primary).partition("pending: ")[2]

    folder = add_stub(rig.models, "stub-gone")
    declared(0, texts=["a raiseword text", "a fine text", "a raiseword, too"])
    assert complaint() == "embedding has rows that were not tried yet"
    db.execute("call embed_pending()")
    db.execute("update knowledge set content = '' where content = 'a raiseword, too'")
    assert re.fullmatch("embedding has 1 row that failed and is tried again, in (29|30) s", complaint())
    db.execute("update knowledge set content = 'a raiseword, too' where content = ''")
    assert re.fullmatch("embedding has 2 rows that failed and are tried again, the next in (29|30) s", complaint())
    db.execute("select embed_column_set('knowledge', 'embedding', enabled => false)")
    paused = "embedding is paused (embed_column_set with enabled => true goes on)"
    assert complaint() == paused
    db.execute("alter table knowledge add other vector(384)")
    db.execute("select embed_column('knowledge', 'content'::name, 'other', model => 'stub-gone')")
    shutil.rmtree(folder)
    missing = "other is not filled (model missing: add it with `autoembed model add`)"
    assert complaint() == f"{paused}; {missing}"


def test_wait_for_less_than_nothing(db: Connection, declared: Knowledge) -> None:
    declared(1)
    with pytest.raises(errors.InvalidParameterValue, match="timeout is -00:00:01") as caught:
        db.execute("call embed_wait('knowledge', '-1 s')")
    assert "0 or more" in str(caught.value.diag.message_hint)


def test_wait_holds_nothing(db: Connection, connect: Connect, declared: Knowledge) -> None:
    declared(2)
    waiter = connect()
    thread = threading.Thread(target=lambda: wait_for(waiter), daemon=True)
    thread.start()
    active = "select state = 'active' from pg_stat_activity where pid = %s"
    wait_until(lambda: scalar(db, active, waiter.info.backend_pid))
    wait_until(lambda: holds_nothing(db, waiter.info.backend_pid))
    db.execute("call embed_pending()")
    thread.join(timeout=5)
    assert not thread.is_alive()


def test_wait_is_for_declared_relations(db: Connection, knowledge: Knowledge) -> None:
    knowledge(1)
    with pytest.raises(errors.UndefinedObject, match="no column declared"):
        db.execute("call embed_wait('knowledge')")
