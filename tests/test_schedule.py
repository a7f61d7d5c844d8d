"""embed_schedule and embed_unschedule with the real pg_cron: whose jobs, which commands, and that they fill."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from psycopg import errors

from support.rigging import CRON, Rig, holds_nothing, rows, scalar
from support.server import Connection, Server, wait_until
from support.talk import DECLARING, notices

pytest_plugins = ["support.rig"]

TABLE = "create table {} (id int primary key, content text, embedding vector(384))"
JOBS = "select username, schedule, command from cron.job order by jobid"
COMMAND = (
    "do 'declare n pg_catalog.int8 := 0; begin if exists (select from pg_catalog.pg_extension where extname "
    "operator(pg_catalog.=) ''pg_autoembed'') then {}; else perform cron.unschedule(''pg_autoembed autoembed 1''); "
    "end if; end'"
)
TICK = COMMAND.format("call autoembed.tick(batch => {})")
WORKER = COMMAND.format(
    "call public.embed_worker(batch => {}, max_seconds => 55, workers => 1, "
    "embedded => n, failed => n, skipped => n, cached => n)"
)
HOSTILE = "create procedure {}.embed_pending(batch int) language sql as 'select 1/0'"
FUNCTIONS = "function embed_schedule, function embed_unschedule, procedure embed_pending, procedure embed_worker"


@pytest.fixture(scope="module")
def cron_rig(make_cron_rig: Callable[..., Rig]) -> Rig:
    return make_cron_rig()


@pytest.fixture
def db(cron_rig: Rig) -> Iterator[Connection]:
    """In pg_cron's database; no jobs, tables and roles are left behind."""
    with cron_rig.server.connect() as connection:
        yield connection
        connection.execute("reset all")
        connection.execute("select embed_unschedule()")
        connection.execute("select cron.unschedule(jobid) from cron.job")
        for table in ("docs", "hers", "his"):
            connection.execute(f"drop table if exists {table}".encode())
        for role in ("alice", "bob", "nobody", "nologin"):
            if scalar(connection, "select count(*) from pg_roles where rolname = %s", role):
                connection.execute(f"drop owned by {role} cascade; drop role {role}".encode())


@pytest.fixture
def server(cron_rig: Rig) -> Server:
    return cron_rig.server


def make_role(db: Connection, name: str, options: str = "login") -> None:
    db.execute(f"create role {name} {options}".encode())
    db.execute(f"grant usage on schema cron to {name}; grant all on schema public to {name}".encode())
    for function in FUNCTIONS.split(", "):
        db.execute(f"grant execute on {function} to {name}".encode())
    db.execute(f"grant execute on function {DECLARING} to {name}".encode())


def make_table(connection: Connection, name: str) -> None:
    connection.execute(TABLE.format(name).encode())
    connection.execute(f"select embed_column('{name}', 'content'::name)".encode())


def refused(connection: Connection, statement: str) -> psycopg.Error:
    with pytest.raises(psycopg.Error) as caught:
        connection.execute(statement.encode())
    return caught.value


# --- which jobs ----------------------------------------------------------------------------------------------------


def test_seconds_become_a_worker_where_pg_cron_has_no_seconds(db: Connection) -> None:
    db.execute("select embed_schedule('10 seconds')")
    natively = scalar(
        db, "select string_to_array(extversion, '.')::text[] >= '{1,5}' from pg_extension where extname = 'pg_cron'"
    )
    expected = ("10 seconds", TICK.format("null")) if natively else ("* * * * *", WORKER.format("null"))
    assert rows(db, JOBS) == [("postgres", *expected)]


def test_seconds_of_a_newer_pg_cron(db: Connection) -> None:
    """As far as the jobs go: what is scheduled is decided by the extension's version."""
    db.execute("begin; update pg_extension set extversion = '1.6' where extname = 'pg_cron'")
    assert rows(db, "select autoembed.job_schedule('10 seconds'), autoembed.job_command('10 seconds', 8, 1, 1)") == [
        ("10 seconds", TICK.format(8))
    ]
    assert scalar(db, "select autoembed.job_command('worker', 32, 1, 1)") == WORKER.format(32)
    db.execute("rollback")


def test_cron_text_and_word(db: Connection) -> None:
    db.execute("select embed_schedule('*/5 * * * *', batch => 8)")
    assert rows(db, JOBS) == [("postgres", "*/5 * * * *", TICK.format(8))]
    db.execute("select embed_schedule('worker')")
    assert rows(db, JOBS) == [("postgres", "* * * * *", WORKER.format("null"))]


def test_idempotent_and_resized(db: Connection) -> None:
    for workers, jobs in ((1, 1), (1, 1), (3, 3), (2, 2)):
        assert len(rows(db, "select * from embed_schedule('worker', workers => %s)", workers)) == jobs
        assert scalar(db, "select count(*) from cron.job") == jobs
    assert scalar(db, "select bool_and(command ~ 'workers => 2') from cron.job")
    others = [("mine",), ("pg_autoembed autoembed 20261231235959",)]
    for (name,) in others:
        db.execute("select cron.schedule(%s, '0 0 * * *', 'select 1')", [name])
    assert scalar(db, "select embed_unschedule()") == 2
    assert rows(db, "select jobname from cron.job order by jobid") == others
    assert scalar(db, "select embed_unschedule()") == 0


def test_another_embed_worker_in_the_same_schema(db: Connection) -> None:
    """Its integers fit plain numbers better than the true one's bigints do."""
    totals = ("embedded", "failed", "skipped")
    arguments = ", ".join(["batch int", "max_seconds int", "workers int", *(f"inout {total} int" for total in totals)])
    db.execute(f"create procedure embed_worker({arguments}) language sql as 'select 1/0, 1, 1'".encode())
    try:
        command = scalar(db, "select command from embed_schedule('worker')")
        db.execute(str(command).replace("max_seconds => 55", "max_seconds => 0").encode())
    finally:
        db.execute("drop procedure embed_worker(int, int, int, int, int, int)")


def test_each_owner_has_his_job(db: Connection, server: Server) -> None:
    make_role(db, "alice")
    make_role(db, "bob")
    make_role(db, "nologin", "nologin")
    for name, table in (("alice", "hers"), ("bob", "his"), ("nologin", "docs")):
        make_table(db, table)
        db.execute(f"alter table {table} owner to {name}".encode())
    with server.connect(role="alice") as alice:
        alice.execute("select embed_schedule('worker')")
        assert [row[0] for row in rows(alice, JOBS)] == ["alice"]
    with notices(db) as heard:
        db.execute("select embed_schedule('worker')")
    assert sorted(row[0] for row in rows(db, JOBS)) == ["alice", "bob"]
    assert [n.message for n in heard if "nologin" in str(n.message)] != []
    with server.connect(role="alice") as alice:
        assert scalar(alice, "select embed_unschedule()") == 1
    assert [row[0] for row in rows(db, JOBS)] == ["bob"]
    assert scalar(db, "select embed_unschedule()") == 1


def test_job_outlives_the_extension_by_one_run(db: Connection, server: Server) -> None:
    """It removes itself, from within any database that has pg_cron; from another one it says what to do."""
    make_role(db, "alice")
    with server.connect(role="alice") as alice:
        commands = [row[3] for row in rows(alice, "select * from embed_schedule('worker', workers => 2)")]
        assert scalar(alice, "select count(*) from cron.job") == 2
        db.execute("drop extension pg_autoembed cascade")
        try:
            for left, command in zip((1, 0), commands, strict=True):
                alice.execute(command)
                assert scalar(alice, "select count(*) from cron.job") == left
        finally:
            db.execute("create extension pg_autoembed")


@pytest.mark.parametrize(("schedule", "called"), [("*/5 * * * *", "embed_pending"), ("worker", "embed_worker")])
def test_owner_who_may_not_execute_what_his_job_calls(
    db: Connection, server: Server, schedule: str, called: str
) -> None:
    """The job is made all the same: the hint is the grant that it lacks."""
    make_role(db, "alice")
    make_table(db, "hers")
    db.execute("alter table hers owner to alice")
    db.execute(f"revoke execute on procedure {called} from alice".encode())
    with server.connect(role="alice") as alice, notices(db) as heard, notices(alice) as heard_by_her:
        for connection in (db, alice):
            connection.execute("select embed_schedule(%s)", [schedule])
    assert [row[0] for row in rows(db, JOBS)] == ["alice"]
    assert heard == heard_by_her
    (said,) = heard
    assert (said.severity, said.sqlstate) == ("WARNING", "01007")
    assert said.message == "the jobs of role alice will fail: it may not execute what they call"
    assert str(said.hint).startswith(f"GRANT EXECUTE ON PROCEDURE public.{called}(integer,")
    db.execute(str(said.hint).encode())
    with notices(db) as heard:
        db.execute("select embed_schedule(%s)", [schedule])
    assert heard == []
    db.execute("begin; revoke usage on schema public from public, alice")
    grants = scalar(db, "select autoembed.missing_grants('alice', %s)", schedule)
    db.execute("rollback")
    assert grants == "GRANT USAGE ON SCHEMA public TO alice"


# --- refusals ------------------------------------------------------------------------------------------------------


INVALID = (
    "61 seconds",
    "0 seconds",
    "10 minutes",
    "now and then or so",
    "* * * *",
    "0 0 * * * *",
    "@never",
    "x'; select 1",
    "",
)
VALID = ("@hourly", "5,35 */2 1-15 jan,jul mon-fri", "0  0 * *\t7", "1 second", "59 seconds", "worker", " worker ")


@pytest.mark.parametrize("schedule", INVALID)
def test_invalid_schedules(db: Connection, schedule: str) -> None:
    error = refused(db, "select embed_schedule($$" + schedule + "$$)")
    assert error.sqlstate == "22023"
    assert "10 seconds" in str(error.diag.message_hint)
    assert rows(db, JOBS) == []


def test_valid_schedules(db: Connection) -> None:
    for schedule in VALID:
        assert scalar(db, "select count(*) from embed_schedule(%s)", schedule) == 1


@pytest.mark.parametrize("arguments", ["batch => 0", "batch => 513", "workers => 0", "workers => 100"])
def test_invalid_arguments(db: Connection, arguments: str) -> None:
    assert refused(db, f"select embed_schedule('worker', {arguments})").sqlstate == "22023"


def test_without_the_right_to_pg_cron(db: Connection, server: Server) -> None:
    make_role(db, "nobody")
    db.execute("revoke usage on schema cron from nobody")
    with server.connect(role="nobody") as nobody:
        error = refused(nobody, "select embed_schedule()")
    assert error.sqlstate == "42501"
    assert "GRANT USAGE ON SCHEMA cron TO nobody" in str(error.diag.message_hint)


def test_in_another_database(db: Connection, server: Server) -> None:
    """Over dblink, where the caller may; else the very statement to be run in pg_cron's database."""
    db.execute("create database elsewhere")
    try:
        with server.connect("elsewhere") as elsewhere:
            elsewhere.execute("create extension pg_autoembed cascade")
            error = refused(elsewhere, "select embed_schedule()")
            assert error.sqlstate == "55000"
            assert error.diag.message_hint == "CREATE EXTENSION dblink here, or run the statement there as a superuser."
            detail = str(error.diag.message_detail)
            statement = detail[detail.index("select cron.") :]
            for schedule in INVALID:
                assert refused(elsewhere, f"select embed_schedule($${schedule}$$)").sqlstate == "22023"
            elsewhere.execute("create extension dblink")
            elsewhere.execute("select embed_schedule('worker')")
            assert rows(db, "select username, database from cron.job") == [("postgres", "elsewhere")]
            command = scalar(elsewhere, "select command from embed_schedule('worker')")
            elsewhere.execute("drop extension pg_autoembed")
            error = refused(elsewhere, command)
            assert "pg_autoembed is not in this database any more" in str(error)
            assert "select cron.unschedule(jobid) from cron.job" in str(error.diag.message_hint)
            elsewhere.execute("create extension pg_autoembed")
            assert scalar(elsewhere, "select embed_unschedule()") == 1
        db.execute(statement.encode())
    finally:
        db.execute("drop database elsewhere with (force)")


def test_without_pg_cron(own_rig: Callable[..., Rig]) -> None:
    rig = own_rig()
    with rig.server.connect() as db:
        for statement in ("select embed_schedule()", "select embed_unschedule()"):
            error = refused(db, statement)
            assert error.sqlstate == "0A000"
            assert "shared_preload_libraries" in str(error.diag.message_hint)
    rig.server.stop()
    rig.server.settings |= CRON | {"cron.use_background_workers": "off"}
    rig.server.start()
    with rig.server.connect() as db:
        assert refused(db, "select embed_schedule()").sqlstate == "42704"
        db.execute("create extension pg_cron")
        with notices(db) as heard:
            db.execute("select embed_schedule()")
        assert [n.severity for n in heard] == ["WARNING"]
        assert "cron.use_background_workers" in str(heard[0].hint)


# --- what a job does -----------------------------------------------------------------------------------------------


def test_a_tick_fills_and_an_idle_one_starts_no_python(db: Connection, server: Server) -> None:
    make_table(db, "docs")
    db.execute("create schema if not exists hostile")
    db.execute("drop procedure if exists hostile.embed_pending")
    db.execute(HOSTILE.format("hostile").encode())
    with server.connect() as job:
        job.execute("set search_path = hostile, public")
        job.execute("call autoembed.tick(batch => 32)")
        maps = f"select pg_read_file('/proc/{job.info.backend_pid}/maps') ~ 'plpython3'"
        assert scalar(job, maps) is False
        job.execute("insert into docs values (1, 'a text')")
        with pytest.raises(errors.DivisionByZero):
            job.execute("call embed_pending(32)")
        job.execute("call autoembed.tick(batch => 32)")
        assert scalar(job, "select count(embedding) from docs") == 1
        assert scalar(job, maps) is True


def test_worker_of_a_job_holds_nothing_asleep(db: Connection, server: Server) -> None:
    """The block around its call keeps no snapshot either."""
    make_table(db, "docs")
    db.execute("insert into docs values (1, 'a text')")
    command = scalar(db, "select command from embed_schedule('worker')")
    with server.connect() as job, ThreadPoolExecutor() as pool:
        ended = pool.submit(job.execute, command)
        wait_until(lambda: scalar(db, "select count(embedding) from docs") == 1)
        wait_until(lambda: holds_nothing(db, job.info.backend_pid))
        db.execute("select pg_terminate_backend(%s)", [job.info.backend_pid])
        assert isinstance(ended.exception(timeout=10), errors.AdminShutdown)


def test_tick_with_nothing_to_be_done_now_starts_no_python(db: Connection, server: Server) -> None:
    """Rows that have failed, for good or until their time comes, and texts that are blank after all."""
    make_table(db, "docs")
    db.execute("insert into docs values (1, 'a raiseword text'), (2, 'another raiseword text'), (3, repeat(' ', 100))")
    db.execute("call embed_pending()")
    db.execute("update autoembed.failure set next_try = null where key = '[1]'")
    with server.connect() as job:
        maps = f"select pg_read_file('/proc/{job.info.backend_pid}/maps') ~ 'plpython3'"
        job.execute("call autoembed.tick(batch => 32)")
        assert scalar(job, maps) is False
        db.execute("update autoembed.failure set next_try = clock_timestamp() where key = '[2]'")
        db.execute("update docs set content = 'a fine text' where id = 1")
        job.execute("call autoembed.tick(batch => 32)")
        assert scalar(job, maps) is True
        assert rows(db, "select key, attempts from autoembed.failure") == [([2], 2)]
        assert scalar(db, "select count(embedding) from docs") == 1


def test_tick_finds_what_is_behind_many_failures(db: Connection, server: Server) -> None:
    make_table(db, "docs")
    db.execute("insert into docs select g, 'a raiseword text ' || g from generate_series(1, 1200) g")
    db.execute(
        """insert into autoembed.failure (registration, key, hash, kind, message)
           select r.id, jsonb_build_array(d.id), autoembed.hash(d.content), 'encoder', 'none'
           from docs d, autoembed.registration r"""
    )
    db.execute("insert into docs values (1201, 'a fine text')")
    db.execute("call autoembed.tick(batch => 32)")
    assert scalar(db, "select count(embedding) from docs") == 1


@pytest.mark.slow
def test_seconds_fill_within_them(db: Connection) -> None:
    """By pg_cron's own seconds, or before 1.5 by a worker that it starts at the next full minute."""
    make_table(db, "docs")
    db.execute("insert into docs values (1, 'a text')")
    db.execute("select embed_schedule('5 seconds')")
    wait_until(lambda: scalar(db, "select count(embedding) from docs") == 1, timeout=75)
    db.execute("insert into docs values (2, 'another text')")
    wait_until(lambda: scalar(db, "select count(embedding) from docs") == 2, timeout=10)
    assert rows(db, "select command, return_message from cron.job_run_details where status = 'failed'") == []


@pytest.mark.slow
def test_jobs_fill_by_themselves_and_come_back(db: Connection, server: Server) -> None:
    """Both styles, as their owners, with a hostile procedure in their way; and after a worker was killed."""
    make_role(db, "alice")
    make_role(db, "bob")
    db.execute("create schema authorization alice")
    for name, table in (("alice", "hers"), ("bob", "his")):
        make_table(db, table)
        db.execute(f"alter table {table} owner to {name}".encode())
        db.execute(f"insert into {table} values (1, 'a text')".encode())
    db.execute(HOSTILE.format("alice").encode())
    with server.connect(role="alice") as alice, server.connect(role="bob") as bob:
        alice.execute("select embed_schedule('* * * * *')")
        bob.execute("select embed_schedule('worker')")
    wait_until(lambda: scalar(db, "select count(h.embedding) + count(i.embedding) from hers h, his i") == 2, timeout=75)
    workers = (
        "select pid from pg_stat_activity where query like '%%call public.embed_worker%%' and pid <> pg_backend_pid()"
    )
    worker = scalar(db, workers)
    db.execute("insert into his values (2, 'while it waits')")
    wait_until(lambda: scalar(db, "select count(embedding) from his") == 2, timeout=5)
    db.execute("select pg_terminate_backend(%s)", [worker])
    db.execute("insert into his values (3, 'after the kill'); insert into hers values (2, 'for the next tick')")
    wait_until(lambda: scalar(db, "select count(embedding) from his") == 3, timeout=70)
    wait_until(lambda: scalar(db, "select count(embedding) from hers") == 2, timeout=70)
    failed = "select command, return_message from cron.job_run_details where status = 'failed' and job_pid <> %s"
    theirs = " and username in ('alice', 'bob')"  # a job of the test before is cancelled when it goes
    assert rows(db, failed + theirs, worker) == []
    db.execute("drop schema alice cascade")
