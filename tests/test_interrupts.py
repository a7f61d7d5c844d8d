"""Cancels, timeouts, terminates and shutdowns: acted upon between two micro-batches, and nothing left behind."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from psycopg import errors

from support.rigging import Filling, Rig, fill, leftovers, pending, rows, scalar
from support.server import Connection, Server, pg_config, wait_until

pytest_plugins = ["support.rig"]

Knowledge = Callable[..., str]
Connect = Callable[..., Connection]

SETTINGS = "select name, setting from pg_settings where name !~ '^transaction_' order by name"
OWN_LOCKS = "select objid::int, mode from pg_locks where locktype = 'advisory' and classid = 77 and pid = %s order by 1"


@pytest.fixture
def server(rig: Rig) -> Server:
    return rig.server


class Worker:
    """A session as a pool hands it out, with settings and advisory locks of its own application."""

    def __init__(self, connection: Connection, rig: Rig) -> None:
        self.connection = connection
        self.rig = rig
        self.pid = connection.info.backend_pid
        connection.execute("set default_transaction_isolation = 'repeatable read'")
        connection.execute("select pg_advisory_lock(77, 1), pg_advisory_lock_shared(77, 2), pg_advisory_lock(77, 1)")
        connection.execute("select embed('warm')")
        connection.execute("do 'begin null; end'")  # PL/pgSQL brings settings along
        self.settings = rows(connection, SETTINGS)
        rig.reset()

    def start(self, pace: float = 0.2, **options: object) -> Filling:
        """A fill that has been encoding for two micro-batches, and goes on for long."""
        self.rig.pace(pace)
        filling = Filling(self.connection, **options)
        self.rig.wait_for_encoding(self.pid, 2)
        return filling

    def assert_as_before(self) -> None:
        """In the same session, as the next user of the pool finds it."""
        assert rows(self.connection, SETTINGS) == self.settings
        held = [(1, "ExclusiveLock"), (2, "ShareLock")]
        assert rows(self.connection, OWN_LOCKS, self.pid) == held
        count = "select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()"
        assert scalar(self.connection, count) == len(held)


@pytest.fixture
def worker(connect: Connect, rig: Rig) -> Worker:
    return Worker(connect(), rig)


def batches_until(rig: Rig, done: Callable[[], bool]) -> int:
    """How many micro-batches begin until then. Of a fill that was stopped one may be on its way, and one beside it."""
    before = len(rig.encodings())
    wait_until(done, pause=0.005)
    return len(rig.encodings()) - before


def assert_goes_on(db: Connection, worker: Worker, count: int) -> None:
    """Nothing is left behind, nobody is blamed, and the same session fills the rest."""
    found = leftovers(db)
    assert found.pop("advisory locks") == 2  # the application's
    assert found == {}
    worker.assert_as_before()
    worker.rig.reset()
    assert fill(worker.connection, batch=512) == (count, 0, 0)
    assert pending(db) == 0


# --- while encoding --------------------------------------------------------------------------------------------


def test_cancel_acts_within_a_batch(db: Connection, declared: Knowledge, worker: Worker) -> None:
    declared(512)
    filling = worker.start(batch=512)
    db.execute("select pg_cancel_backend(%s)", [worker.pid])
    assert batches_until(worker.rig, lambda: filling.done) <= 2
    with pytest.raises(errors.QueryCanceled):
        filling.result  # noqa: B018
    assert_goes_on(db, worker, 512)


def test_batches_before_a_cancel_stay(db: Connection, declared: Knowledge, worker: Worker) -> None:
    declared(512)
    filling = worker.start(batch=8)
    db.execute("select pg_cancel_backend(%s)", [worker.pid])
    filling.wait()
    left = pending(db)
    assert 0 < left < 512
    assert left % 8 == 0
    assert_goes_on(db, worker, left)


@contextmanager
def cancels(connection: Connection, pid: int) -> Iterator[None]:
    """While the block runs that backend is cancelled again and again."""
    enough = threading.Event()

    def run() -> None:
        while not enough.wait(0.002):
            connection.execute("select pg_cancel_backend(%s)", [pid])

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        enough.set()
        thread.join()


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.11])
def test_many_cancels_leave_nothing_either(
    db: Connection, connect: Connect, declared: Knowledge, worker: Worker, delay: float
) -> None:
    declared(512)
    filling = worker.start(pace=0.05, batch=128)
    time.sleep(delay)
    with cancels(connect(), worker.pid):
        wait_until(lambda: filling.done)
    assert pending(db) > 0
    with pytest.raises(errors.QueryCanceled):
        filling.result  # noqa: B018
    found = leftovers(db)
    assert found == {"advisory locks": 2}
    worker.assert_as_before()


def test_statement_timeout_acts_within_a_batch(db: Connection, declared: Knowledge, worker: Worker) -> None:
    declared(512)
    worker.connection.execute("set statement_timeout = '700ms'")
    worker.rig.pace(0.2)
    filling = Filling(worker.connection, batch=512)
    assert batches_until(worker.rig, lambda: filling.done) <= 700 / 200 + 2
    with pytest.raises(errors.QueryCanceled, match="statement timeout"):
        filling.result  # noqa: B018
    worker.connection.execute("reset statement_timeout")
    assert_goes_on(db, worker, 512)


def test_terminate_acts_within_a_batch_and_blames_nobody(
    db: Connection, connect: Connect, declared: Knowledge, worker: Worker, rig: Rig
) -> None:
    declared(512)
    filling = worker.start(batch=512)
    db.execute("select pg_terminate_backend(%s)", [worker.pid])
    gone = "select count(*) = 0 from pg_stat_activity where pid = %s"
    assert batches_until(rig, lambda: bool(scalar(db, gone, worker.pid))) <= 2
    with pytest.raises(psycopg.OperationalError):
        filling.result  # noqa: B018
    rig.reset()
    assert fill(db, batch=512) == (512, 0, 0)
    assert leftovers(db) == {}
    assert len(rig.encodings()) == 64  # not one by one, as suspects are


def test_client_that_goes_away_leaves_nothing(db: Connection, connect: Connect, declared: Knowledge, rig: Rig) -> None:
    declared(64)
    leaving = connect()
    leaving.execute("set client_connection_check_interval = '100ms'")
    with rig.encoding(leaving, batch=64) as filling:
        pid = filling.pid
        leaving.pgconn.finish()
    wait_until(lambda: scalar(db, "select count(*) = 0 from pg_stat_activity where pid = %s", pid))
    fill(db)
    assert pending(db) == 0
    assert leftovers(db) == {}


# --- while claiming and writing --------------------------------------------------------------------------------


@pytest.mark.parametrize("obstacle", ["lock table knowledge", "select pg_advisory_xact_lock(autoembed.solo_lock())"])
def test_cancel_while_claiming(
    db: Connection, connect: Connect, declared: Knowledge, worker: Worker, obstacle: str
) -> None:
    declared(20)
    holder = connect(autocommit=False)
    holder.execute(obstacle)
    filling = Filling(worker.connection)
    wait_until(lambda: scalar(db, "select wait_event_type = 'Lock' from pg_stat_activity where pid = %s", worker.pid))
    db.execute("select pg_cancel_backend(%s)", [worker.pid])
    with pytest.raises(errors.QueryCanceled):
        filling.result  # noqa: B018
    holder.rollback()
    assert_goes_on(db, worker, 20)


SLOW = """
create function slow() returns trigger language plpgsql as 'begin perform pg_sleep(0.3); return new; end';
create trigger slow before update on knowledge for each row when (new.id in (5, 9, 17)) execute function slow();
"""


def wait_for_the_write(db: Connection, pid: int) -> None:
    wait_until(lambda: scalar(db, "select wait_event = 'PgSleep' from pg_stat_activity where pid = %s", pid))


@pytest.mark.parametrize("times", [1, 3])
def test_cancel_while_writing(db: Connection, declared: Knowledge, worker: Worker, times: int) -> None:
    declared(20)
    db.execute(SLOW)
    filling = Filling(worker.connection)
    wait_for_the_write(db, worker.pid)
    for _ in range(times):
        db.execute("select pg_cancel_backend(%s)", [worker.pid])
    with pytest.raises(errors.QueryCanceled):
        filling.result  # noqa: B018
    assert pending(db) == 20
    assert_goes_on(db, worker, 20)


def test_terminate_while_writing(db: Connection, declared: Knowledge, worker: Worker) -> None:
    declared(20)
    db.execute(SLOW)
    filling = Filling(worker.connection)
    wait_for_the_write(db, worker.pid)
    db.execute("select pg_terminate_backend(%s)", [worker.pid])
    filling.wait()
    assert pending(db) == 20
    assert fill(db) == (20, 0, 0)
    assert leftovers(db) == {}


def test_statement_timeout_while_writing(db: Connection, declared: Knowledge, worker: Worker) -> None:
    declared(20)
    db.execute(SLOW)
    worker.connection.execute("set statement_timeout = '500ms'")
    with pytest.raises(errors.QueryCanceled):
        fill(worker.connection)
    worker.connection.execute("reset statement_timeout")
    assert pending(db) == 20
    assert_goes_on(db, worker, 20)


def test_cancel_that_a_trigger_raises_is_nobodys_failure(db: Connection, declared: Knowledge, worker: Worker) -> None:
    declared(20)
    db.execute(
        """create function give_up() returns trigger language plpgsql as
           'begin raise exception ''no time'' using errcode = ''query_canceled''; end'"""
    )
    db.execute("create trigger t before update on knowledge for each row when (new.id = 5) execute function give_up()")
    with pytest.raises(errors.QueryCanceled):
        fill(worker.connection)
    db.execute("drop trigger t on knowledge")
    assert_goes_on(db, worker, 20)


def test_lock_timeout_while_writing(
    db: Connection, connect: Connect, declared: Knowledge, worker: Worker, rig: Rig
) -> None:
    declared(20)
    worker.connection.execute("set lock_timeout = '50ms'")
    holder = connect(autocommit=False)
    with rig.encoding(worker.connection) as filling:
        holder.execute("lock table knowledge in share mode")
    with pytest.raises(errors.LockNotAvailable):
        filling.result  # noqa: B018
    holder.rollback()
    worker.connection.execute("reset lock_timeout")
    assert_goes_on(db, worker, 20)


# --- the server goes -------------------------------------------------------------------------------------------


def filling_server(rig: Rig) -> Filling:
    """A fill of 256 rows that has embedded some batches and encodes another."""
    connection = rig.server.connect()
    connection.execute("create table knowledge (id int primary key, content text, embedding vector(384))")
    connection.execute("insert into knowledge select g, 'text ' || g from generate_series(1, 256) g")
    connection.execute("select embed_column('knowledge', 'content'::name)")
    rig.pace(0.1)
    filling = Filling(connection, batch=32)
    rig.wait_for_encoding(filling.pid, 6)
    return filling


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_shutdown_while_encoding(own_rig: Callable[..., Rig], mode: str) -> None:
    rig = own_rig()
    filling = filling_server(rig)
    stop = [str(pg_config("--bindir") / "pg_ctl"), "stop", "-m", mode, "-D", str(rig.server.directory / "data"), "-s"]
    subprocess.run(stop, check=True)
    filling.wait()
    rig.reset()
    rig.server.start()
    with rig.server.connect() as db:
        left = pending(db)
        assert 0 < left < 256
        assert left % 32 == 0
        assert fill(db) == (left, 0, 0)
        assert leftovers(db) == {}
    alone = [texts for _, texts in rig.encodings() if texts == 1]
    assert len(alone) == (32 if mode == "immediate" else 0)


# --- the real encoder ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_cancel_of_the_real_encoder(
    db: Connection, connect: Connect, knowledge: Knowledge, rig: Rig, model_dir: Path
) -> None:
    name = "all-MiniLM-L6-v2"
    if not (rig.models / name).exists():
        (rig.models / name).symlink_to(model_dir / name)
    knowledge(texts=[f"{number} is a long text that fills the model's window " * 60 for number in range(512)])
    db.execute("select embed_column('knowledge', 'content'::name, model => %s::text)", [name])
    worker = connect()
    worker.execute("select embed('warm', %s)", [name])
    rig.reset()
    filling = Filling(worker, batch=512)
    rig.wait_for_encoding(filling.pid, 3)
    db.execute("select pg_cancel_backend(%s)", [filling.pid])
    assert batches_until(rig, lambda: filling.done) <= 2
    with pytest.raises(errors.QueryCanceled):
        filling.result  # noqa: B018
    assert leftovers(db) == {}
    assert pending(db) == 512
