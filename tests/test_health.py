"""embedding_health: each check in each state, by what really brings it about; and that it always answers, cheaply."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import psycopg
import pytest
from psycopg import errors

from support.rigging import Rig, fill, rows, scalar
from support.server import Connection, Server, wait_until
from support.talk import acting_as

pytest_plugins = ["support.rig"]

Knowledge = Callable[..., str]
Connect = Callable[..., Connection]
CHECKS = (
    "extension", "model", "encoder", "settings", "device", "torch", "preload", "columns", "schedule", "pending",
    "failures", "suspects",
)  # fmt: skip
WORKING = {"shared_preload_libraries": "pg_cron, autoembed_preload", "track_commit_timestamp": "on"}
TABLE = "create table docs (id int primary key, content text, embedding vector(384))"
DECLARE = "select embed_column('docs', 'content'::name)"
RUN = """
    insert into cron.job_run_details (jobid, runid, job_pid, database, username, command, status, start_time)
    select jobid, nextval('cron.runid_seq'), 1, database, username, command, %s, clock_timestamp() - %s::interval
    from cron.job
"""


@pytest.fixture
def server(rig: Rig) -> Server:
    """Neither pg_cron nor preloaded models, nor times of commits."""
    return rig.server


@pytest.fixture(scope="module")
def working_rig(make_cron_rig: Callable[..., Rig]) -> Rig:
    """With all of them."""
    return make_cron_rig(WORKING, EMBEDDING_PRELOAD="stub-384")


@pytest.fixture
def home(working_rig: Rig) -> Iterator[Connection]:
    """pg_cron's own database, in which all is well: table docs is declared, a job fills it."""
    with working_rig.server.connect() as connection:
        connection.execute(f"{TABLE}; {DECLARE}; select embed_schedule('0 0 1 1 *')".encode())
        yield connection
        connection.execute("drop table if exists docs; select embed_unschedule(); truncate cron.job_run_details")


def health(connection: Connection) -> dict[str, tuple[str, str, str]]:
    found = rows(connection, "select check_name, status, message, coalesce(hint, '') from embedding_health")
    assert [row[0] for row in found] == list(CHECKS)
    return {name: (status, message, hint) for name, status, message, hint in found}


def ill(connection: Connection) -> dict[str, str]:
    return {name: status for name, (status, *_) in health(connection).items() if status != "ok"}


def check(connection: Connection, name: str) -> tuple[str, str, str]:
    return health(connection)[name]


# --- all together --------------------------------------------------------------------------------------------------


def test_all_is_well(home: Connection) -> None:
    assert ill(home) == {}
    assert "loaded by the postmaster" in check(home, "preload")[1]
    assert "GFLOP/s" in check(home, "torch")[1]
    home.execute("insert into docs values (1, 'a text')")
    fill(home)
    assert ill(home) == {}


def test_a_bare_server(db: Connection, connect: Connect, declared: Knowledge) -> None:
    """Nothing preloaded, nothing scheduled, and a look at that loads nothing."""
    assert ill(db) == {"preload": "warn"}
    assert "no model is preloaded" in check(db, "preload")[1]
    declared(1)
    connection = connect()
    connection.execute("set default_transaction_read_only = on")
    assert ill(connection) == {"preload": "warn", "schedule": "warn"}
    loaded = "do $$ import sys; assert not {'torch', 'numpy', 'orjson'} & set(sys.modules) $$ language plpython3u"
    connection.execute(loaded.encode())


# --- extension and encoding ----------------------------------------------------------------------------------------


def test_former_version(db: Connection) -> None:
    db.execute("update pg_extension set extversion = '0.0.9' where extname = 'pg_autoembed'")
    status, message, hint = check(db, "extension")
    assert (status, hint) == ("warn", "ALTER EXTENSION pg_autoembed UPDATE")
    assert "this database has pg_autoembed 0.0.9, the server 0." in message


def test_weights_changed_and_restored(working_rig: Rig, home: Connection) -> None:
    folder = working_rig.models / "stub-384"
    (folder / "model.safetensors").write_text("STUB-384")
    try:
        assert ill(home) == {"model": "fail"}
        assert "was changed after it was added: model.safetensors" in check(home, "model")[1]
        folder.rename(folder.with_name("elsewhere"))
        assert ill(home) == {"model": "fail", "encoder": "warn", "columns": "warn"}
        assert "1 of 1 columns not ready: docs.embedding: model missing" in check(home, "columns")[1]
    finally:
        folder.with_name("elsewhere").rename(folder)
        (folder / "model.safetensors").write_text("stub-384")
    assert ill(home) == {}


def test_model_added_again_is_not_the_preloaded_one(working_rig: Rig, home: Connection) -> None:
    manifest = working_rig.models / "stub-384" / "autoembed.json"
    former = manifest.read_text()
    manifest.write_text(former.replace('"max_tokens": 64', '"max_tokens": 32'))
    try:
        assert ill(home) == {"preload": "warn", "columns": "warn"}
        assert "model changed" in check(home, "columns")[1]
        assert check(home, "preload")[2].startswith("Restart the server")
    finally:
        manifest.write_text(former)


def test_python_that_does_not_fit(db: Connection) -> None:
    """An extension of another release than the package; the rest of the view still answers."""
    for name, version in (("start", "api_version="), ("list_checks", '"autoembed ')):
        whole = str(scalar(db, "select pg_get_functiondef(%s::regproc)", f"autoembed.{name}"))
        db.execute(whole.replace(f"{version}1", f"{version}2").encode())
    found = {row[0]: row for row in rows(db, "select * from embedding_health")}
    assert found["encoding"][1] == "fail"
    assert "the extension's SQL speaks version 2" in found["encoding"][2]
    assert found["failures"][1] == "ok"


# --- who fills -----------------------------------------------------------------------------------------------------


def test_nobody_fills(db: Connection, connect: Connect, declared: Knowledge) -> None:
    declared(0, texts=["", " "])
    assert check(db, "schedule")[0] == "ok"
    db.execute("insert into knowledge (content) values ('a text')")
    status, message, hint = check(db, "schedule")
    assert status == "warn"
    assert message == "knowledge has rows to be filled, but postgres has no worker and no job"
    assert "pg_cron is not in this server" in hint
    worker = connect()
    worker.execute("set statement_timeout = '20s'")
    with psycopg.connect(worker.info.dsn, autocommit=True) as other:
        place = scalar(other, "select autoembed.take_place(autoembed.own_places(3))")
        assert check(db, "schedule")[0] == "ok"
        assert place is not None
    wait_until(lambda: check(db, "schedule")[0] == "warn")
    db.execute("select embed_column_set('knowledge', 'embedding', enabled => false)")
    assert check(db, "schedule")[0] == "ok"
    assert check(db, "columns") == ("ok", "1 declared, of which paused: 1", "")


def test_job_without_rows_and_rows_without_a_job(home: Connection) -> None:
    home.execute("select embed_unschedule()")
    assert check(home, "schedule")[0] == "ok"
    home.execute("insert into docs values (1, 'a text')")
    status, message, hint = check(home, "schedule")
    assert (status, message) == ("warn", "docs has rows to be filled, but postgres has no worker and no job")
    assert hint.startswith("embed_schedule() makes a job")


@pytest.mark.parametrize(
    ("schedule", "run", "trouble"),
    [
        ("* * * * *", ("succeeded", "1 minute"), None),
        ("* * * * *", ("running", "1 hour"), None),
        ("* * * * *", ("failed", "1 minute"), "failed when it was last run"),
        ("* * * * *", ("succeeded", "1 hour"), "was last started at"),
        ("*/30 * * * *", ("succeeded", "1 hour"), None),
        ("*/30 * * * *", ("succeeded", "2 hours"), "was last started at"),
        ("0 3 * * *", ("succeeded", "25 hours"), None),
    ],
)
def test_last_run(home: Connection, schedule: str, run: tuple[str, str], trouble: str | None) -> None:
    home.execute("select embed_schedule(%s)", [schedule])
    home.execute(RUN, run)
    status, message, hint = check(home, "schedule")
    assert status == ("warn" if trouble else "ok")
    assert (trouble or "fills for each owner") in message
    assert ("cron.job_run_details" in hint) == (trouble is not None)


def test_job_that_is_switched_off(home: Connection) -> None:
    home.execute("update cron.job set active = false")
    assert "of postgres is switched off" in check(home, "schedule")[1]


@pytest.mark.slow
def test_job_that_fails(home: Connection, working_rig: Rig) -> None:
    """As pg_cron itself runs it, and writes it down."""
    home.execute("create role alice login; grant usage on schema cron to alice; alter table docs owner to alice")
    home.execute("grant execute on function embed_schedule to alice; insert into docs values (1, 'a text')")
    try:
        with working_rig.server.connect(role="alice") as alice:
            alice.execute("select embed_schedule('* * * * *')")
            wait_until(lambda: check(alice, "schedule")[0] == "warn", timeout=75)
            assert "of alice failed when it was last run" in check(alice, "schedule")[1]
            home.execute("grant execute on procedure embed_pending to alice")
            wait_until(lambda: check(alice, "schedule")[0] == "ok", timeout=75)
        assert check(home, "schedule")[0] == "ok"
    finally:
        home.execute("select embed_unschedule(); drop owned by alice; drop role alice; " + TABLE + "; " + DECLARE)


def test_jobs_in_another_database(home: Connection, working_rig: Rig) -> None:
    home.execute("create database elsewhere")
    try:
        with working_rig.server.connect("elsewhere") as elsewhere:
            elsewhere.execute("create extension pg_autoembed cascade")
            elsewhere.execute(f"{TABLE}; {DECLARE}; insert into docs values (1, 'a text')".encode())
            assert "keeps its jobs in another database" in check(elsewhere, "schedule")[2]
    finally:
        home.execute("drop database elsewhere with (force)")


# --- what waits, and what has failed -------------------------------------------------------------------------------


def overdue(connection: Connection, patience: str = "1 second") -> str:
    """As the view asks, with less patience."""
    return str(scalar(connection, "select status from autoembed.pending_health(%s)", patience))


def test_row_that_waits_too_long(home: Connection) -> None:
    home.execute("select embed_schedule('* * * * *')")
    patient = "-2 minutes"  # a second longer than the job's two intervals
    home.execute("insert into docs values (1, 'a text'), (2, null), (3, %s)", [" " * 100])
    assert overdue(home, "0") == "ok"
    assert overdue(home, patient) == "warn"
    home.execute("insert into docs values (4, 'a raiseword text')")
    fill(home)
    assert overdue(home, patient) == "ok"
    assert scalar(home, "select count(*) from docs where embedding is null") == 3


def test_old_rows_of_a_table_that_is_being_filled(home: Connection) -> None:
    home.execute("select embed_unschedule(); insert into docs select g, 'text ' || g from generate_series(1, 40) g")
    wait_until(lambda: overdue(home, "0.1 seconds") == "warn")
    fill(home, max_rows=8)
    assert overdue(home, "1 minute") == "ok"
    home.execute("update autoembed.run set finished = finished + '1 minute'::interval")
    assert overdue(home, "0.1 seconds") == "ok"
    home.execute("update autoembed.run set finished = finished - '2 minutes'::interval")
    status, message, _ = rows(home, "select status, message, hint from autoembed.pending_health('0.1 seconds')")[0]
    assert status == "warn"
    assert message.startswith("docs.embedding: rows wait since 20")


def test_waiting_without_times_of_commits(db: Connection, declared: Knowledge) -> None:
    """What was there at the last checkpoint is old."""
    declared(1)
    assert check(db, "pending")[0] == "ok"
    db.execute("checkpoint")
    assert check(db, "pending")[0] == "warn"
    fill(db)
    db.execute("insert into knowledge (content) values ('another text')")
    assert check(db, "pending")[0] == "ok"


def test_failures_and_suspects(db: Connection, declared: Knowledge) -> None:
    declared(0, texts=["a raiseword secret", "another raiseword secret", "a fine text"])
    fill(db)
    assert check(db, "failures")[:2] == ("warn", "0 rows have failed for good, 2 will be tried again")
    db.execute("update autoembed.failure set next_try = null where key = '[1]'")
    assert check(db, "failures")[:2] == ("warn", "1 row has failed for good, 1 will be tried again")
    assert "embed_retry" in check(db, "failures")[2]
    db.execute("insert into autoembed.suspect select registration, key, hash from autoembed.failure where key = '[2]'")
    db.execute("delete from autoembed.failure")
    assert check(db, "suspects")[:2] == ("warn", "1 text was being embedded when the server crashed")
    assert "secret" not in str(rows(db, "select * from embedding_health"))


# --- who asks ------------------------------------------------------------------------------------------------------


def test_stranger_hears_of_nobodys_rows(
    db: Connection, connect: Connect, declared: Knowledge, role: Callable[..., str]
) -> None:
    declared(0, texts=["a raiseword text", "a text"])
    fill(db, max_rows=1)
    db.execute("insert into knowledge (content) values ('a later text'); checkpoint")
    assert {"schedule", "pending", "failures"} <= ill(db).keys()
    role("alice")
    alice = connect("alice")
    assert ill(alice) == {"preload": "warn"}
    assert check(alice, "schedule")[1] == "no column of the reader's is declared"


def test_a_path_of_anothers_making_runs_nothing(db: Connection, role: Callable[..., str]) -> None:
    """As where ALTER DATABASE … SET search_path puts a tenant's schema before pg_catalog."""
    role("alice")
    raising = "returns {} language plpgsql as 'begin raise exception $x$ran as %$x$, current_user; end'"
    db.execute(f"create function alice.joined(text, text) {raising.format('text')}".encode())
    db.execute(f"create function alice.alike(text, text) {raising.format('boolean')}".encode())
    db.execute("create operator alice.|| (function = alice.joined, leftarg = text, rightarg = text)")
    db.execute("create operator alice.= (function = alice.alike, leftarg = text, rightarg = text)")
    db.execute("set search_path = alice, pg_catalog")
    found = db.execute("select check_name, status, message from public.embedding_health").fetchall()
    db.execute("reset search_path")
    assert [row for row in found if "could not be made" in row[2] or "ran as" in row[2]] == []
    assert len(found) == len(CHECKS)


def test_another_owners_table_is_known_by_statistics(
    db: Connection, declared: Knowledge, role: Callable[..., str]
) -> None:
    """A superuser's look would run its owner's code, if it read the table."""
    declared(0)
    role("alice")
    db.execute("alter table knowledge owner to alice; insert into knowledge (content) values ('a text')")
    db.execute("checkpoint")
    assert ill(db) == {"preload": "warn"}
    db.execute("analyze knowledge")
    assert check(db, "schedule")[0] == "warn"
    assert "alice has no worker and no job" in check(db, "schedule")[1]
    assert check(db, "pending")[0] == "ok"
    with acting_as(db, "alice"):
        assert {"schedule", "pending"} <= ill(db).keys()
    db.execute("drop table knowledge")


def test_locked_table_delays_nobody(db: Connection, connect: Connect, declared: Knowledge) -> None:
    declared(1)
    holder = connect()
    db.execute("set statement_timeout = '30s'")
    with holder.transaction():
        holder.execute("lock table knowledge in access exclusive mode")
        found = health(db)
    assert found["pending"][:2] == ("warn", "this check could not be made (SQLSTATE 55P03)")
    assert found["failures"][0] == "ok"


def test_cancel_ends_it(db: Connection, connect: Connect, declared: Knowledge) -> None:
    """A check that cannot be made is a warning; a look that is not to be made is none."""
    declared(1)
    slow = "function autoembed.schedule_hint(failed boolean) returns text language sql as 'select pg_sleep(20)::text'"
    db.execute(f"create or replace {slow}".encode())
    connection = connect()
    connection.execute("set statement_timeout = '500ms'")
    with pytest.raises(errors.QueryCanceled):
        connection.execute("select * from embedding_health")
