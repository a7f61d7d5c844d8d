"""Backends and servers that die with rows in flight: whom a crash is blamed on, and how often it can come again."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator

import psycopg
import pytest
from psycopg import sql

from conftest import Database
from support.rigging import Filling, Rig, Row, fill, leftovers, pending, rows, scalar
from support.server import Connection, Server, wait_until

pytest_plugins = ["support.rig"]

Knowledge = Callable[..., str]
Connect = Callable[..., Connection]


@pytest.fixture
def rig(module_rig: Rig) -> Iterator[Rig]:
    module_rig.reset()
    yield module_rig
    module_rig.reset()


@pytest.fixture
def server(rig: Rig) -> Server:
    return rig.server


def crashes(server: Server) -> int:
    return server.log.count("all server processes terminated; reinitializing")


def wait_for_crash(server: Server, before: int) -> None:
    wait_until(lambda: crashes(server) > before)
    server.wait_until_ready()


def fill_through_crashes(database: Database, most: int, *statements: str) -> int:
    """Calls embed_pending as an administrator's timer does, until it comes through; how often the server crashed."""
    server, first = database.server, crashes(database.server)
    while True:
        before = crashes(server)
        try:
            with server.connect(database.name) as connection:
                for statement in statements:
                    connection.execute(statement)
                fill(connection, batch=16)
                return crashes(server) - first
        except psycopg.OperationalError:
            wait_for_crash(server, before)
        assert crashes(server) - first <= most, "the server crashes again and again"


def poisoned(count: int, *bad: int) -> list[str]:
    return [f"text {n}{' with poison' if n in bad else ''}" for n in range(1, count + 1)]


def failures(connection: Connection) -> list[Row]:
    days = "round(extract(epoch from next_try - last_try) / 86400)::int"
    return rows(connection, f"select (key ->> 'id')::int, kind, attempts, {days} from embedding_failures order by 1")


# --- a text that kills the process -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "most"), [((40,), 4), ((1, 2), 7), ((7, 90), 8)], ids=["one", "two-in-a-batch", "two-in-two-batches"]
)
def test_deadly_text_is_found_and_all_others_are_embedded(
    database: Database, declared: Knowledge, rig: Rig, bad: tuple[int, ...], most: int
) -> None:
    declared(texts=poisoned(100, *bad))
    rig.kill_at("poison")
    assert fill_through_crashes(database, most) == most
    with database.server.connect(database.name) as db:
        assert failures(db) == [(n, "crashed", 1, 1) for n in bad]
        assert rows(db, "select id from knowledge where embedding is null order by id") == [(n,) for n in bad]
        assert fill(db) == (0, 0, 0)
        assert set(leftovers(db)) == {"failures"}


def test_asynchronous_commits_change_nothing(database: Database, declared: Knowledge, rig: Rig) -> None:
    declared(texts=poisoned(100, 40))
    rig.kill_at("poison")
    assert fill_through_crashes(database, 4, "set synchronous_commit = off") == 4
    with database.server.connect(database.name) as db:
        assert failures(db) == [(40, "crashed", 1, 1)]
        assert scalar(db, "show synchronous_commit") == "on"


def test_two_workers_blame_only_the_deadly_text(database: Database, declared: Knowledge, rig: Rig) -> None:
    declared(texts=poisoned(200, 40))
    rig.kill_at("poison")
    rig.pace(0.01)
    threads = [threading.Thread(target=fill_through_crashes, args=(database, 8)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.server.connect(database.name) as db:
        fill(db)
        assert failures(db) == [(40, "crashed", 1, 1)]
        assert pending(db) == 1
        assert set(leftovers(db)) == {"failures"}


def test_retry_tries_a_deadly_text_alone(database: Database, declared: Knowledge, rig: Rig) -> None:
    declared(texts=poisoned(40, 20))
    rig.kill_at("poison")
    fill_through_crashes(database, 4)
    with database.server.connect(database.name) as db:
        assert scalar(db, "select embed_retry()") == 1
        db.execute("insert into knowledge (content) select 'later ' || g from generate_series(1, 40) g")
    assert fill_through_crashes(database, 1) == 1
    with database.server.connect(database.name) as db:
        assert [failure[:2] for failure in failures(db)] == [(20, "crashed")]
        assert pending(db) == 1
        rig.reset()
        db.execute("select embed_retry()")
        assert fill(db) == (1, 0, 0)
        assert leftovers(db) == {}


def test_deadly_text_is_tried_again_after_a_day_alone(database: Database, declared: Knowledge, rig: Rig) -> None:
    declared(texts=poisoned(20, 5))
    rig.kill_at("poison")
    fill_through_crashes(database, 4)
    with database.server.connect(database.name) as db:
        db.execute("insert into knowledge (content) values ('later')")
        db.execute("update autoembed.failure set next_try = now() - interval '1 s'")
    assert fill_through_crashes(database, 1) == 1
    with database.server.connect(database.name) as db:
        assert failures(db) == [(5, "crashed", 2, 1)]
        assert pending(db) == 1
        db.execute("update autoembed.failure set next_try = now() - interval '1 s'")
        rig.reset()
        assert fill(db) == (1, 0, 0)
        assert leftovers(db) == {}


def test_changed_text_is_tried_again(database: Database, declared: Knowledge, rig: Rig) -> None:
    declared(texts=poisoned(20, 5))
    rig.kill_at("poison")
    fill_through_crashes(database, 4)
    with database.server.connect(database.name) as db:
        db.execute("update knowledge set content = 'harmless' where id = 5")
        assert fill(db) == (1, 0, 0)
        assert leftovers(db) == {}


def test_suspect_flies_alone(db: Connection, connect: Connect, declared: Knowledge, rig: Rig) -> None:
    declared(40)
    db.execute(
        "insert into autoembed.suspect select r.id, '[7]', autoembed.hash(k.content)"
        " from autoembed.registration r, knowledge k where k.id = 7"
    )
    second = connect()
    with rig.encoding(connect(), batch=16) as first:
        other = Filling(second, batch=16)
        waits = "select wait_event from pg_stat_activity where pid = %s"
        wait_until(lambda: scalar(db, waits, other.pid) == "advisory")
        assert rows(db, "select keys, alone from autoembed.inflight") == [([[7]], True)]
    assert first.result[0] + other.result[0] == 40
    assert leftovers(db) == {}


# --- nobody's fault --------------------------------------------------------------------------------------------


def test_killed_worker_blames_nobody(
    database: Database, db: Connection, connect: Connect, declared: Knowledge, rig: Rig
) -> None:
    declared(200)
    rig.pace(0.05)
    fillings = [Filling(connect(), batch=16) for _ in range(2)]
    for filling in fillings:
        rig.wait_for_encoding(filling.pid, 3)
    before = crashes(database.server)
    os.kill(fillings[0].pid, signal.SIGKILL)
    wait_for_crash(database.server, before)
    for filling in fillings:
        filling.wait()
    rig.reset()
    with database.server.connect(database.name) as again:
        left = pending(again)
        assert 0 < left < 200
        assert left % 16 == 200 % 16
        assert fill(again, batch=16) == (left, 0, 0)
        assert leftovers(again) == {}
    assert sum(texts == 1 for _, texts in rig.encodings()) == 32  # both batches in flight, one by one


def test_worker_killed_while_writing(
    database: Database, db: Connection, connect: Connect, declared: Knowledge, rig: Rig
) -> None:
    declared(20)
    db.execute(
        "create function slow() returns trigger language plpgsql as 'begin perform pg_sleep(9); return new; end'"
    )
    db.execute("create trigger slow before update on knowledge for each row when (new.id = 9) execute function slow()")
    filling = Filling(connect())
    wait_until(lambda: scalar(db, "select wait_event from pg_stat_activity where pid = %s", filling.pid) == "PgSleep")
    before = crashes(database.server)
    os.kill(filling.pid, signal.SIGKILL)
    wait_for_crash(database.server, before)
    filling.wait()
    with database.server.connect(database.name) as again:
        assert pending(again) == 20
        again.execute("drop trigger slow on knowledge")
        assert fill(again) == (20, 0, 0)
        assert leftovers(again) == {}


def test_crash_after_a_terminate_blames_nobody_for_long(
    database: Database, db: Connection, connect: Connect, declared: Knowledge, rig: Rig
) -> None:
    declared(20)
    worker, bystander = connect(), connect()
    with rig.encoding(worker) as filling:
        db.execute("select pg_terminate_backend(%s)", [filling.pid])
    assert scalar(db, "select count(*) from autoembed.inflight") == 1
    before = crashes(database.server)
    os.kill(bystander.info.backend_pid, signal.SIGKILL)
    wait_for_crash(database.server, before)
    with database.server.connect(database.name) as again:
        assert fill(again) == (20, 0, 0)
        assert leftovers(again) == {}


def test_bystanders_crashes_while_a_suspect_flies_alone_blame_nobody(
    database: Database, declared: Knowledge, rig: Rig
) -> None:
    declared(20)
    for suspects in (0, 1, 1):
        before = crashes(database.server)
        rig.reset()
        with database.server.connect(database.name) as worker, database.server.connect(database.name) as bystander:
            rig.hold(worker.info.backend_pid)
            filling = Filling(worker)
            rig.wait_for_encoding(filling.pid)
            assert scalar(bystander, "select count(*) from autoembed.inflight where alone") == suspects
            os.kill(bystander.info.backend_pid, signal.SIGKILL)
            wait_for_crash(database.server, before)
            filling.wait()
    rig.reset()
    with database.server.connect(database.name) as db:
        db.execute("select autoembed.recover(r.id) from autoembed.registration r")
        assert scalar(db, "select max(crashes) from autoembed.suspect") == 2
        assert failures(db) == []
        assert fill(db) == (20, 0, 0)
        assert leftovers(db) == {}


def test_restarts_of_the_server_are_proof_only_when_they_go_on(db: Connection, declared: Knowledge, rig: Rig) -> None:
    """As an immediate shutdown leaves it: the flight is of another start of the server, and its twin is gone."""
    declared(16)
    for restart in range(1, 7):
        db.execute(
            "insert into autoembed.inflight (registration, cluster, alone, keys, hashes, server_start)"
            " select r.id, autoembed.cluster(), true, array['[1]']::jsonb[], array[autoembed.hash(k.content)],"
            " pg_postmaster_start_time() - interval '1 hour'"
            " from autoembed.registration r, knowledge k where k.id = 1"
        )
        db.execute("select autoembed.recover(r.id) from autoembed.registration r")
        assert len(failures(db)) == (1 if restart == 6 else 0)
    assert failures(db) == [(1, "crashed", 1, 1)]
    assert fill(db) == (15, 0, 0)


def test_crash_with_nothing_in_flight_leaves_no_suspects(
    database: Database, connect: Connect, declared: Knowledge, rig: Rig
) -> None:
    declared(40)
    worker = connect()
    fill(worker, batch=16, max_rows=20)
    before = crashes(database.server)
    os.kill(worker.info.backend_pid, signal.SIGKILL)
    wait_for_crash(database.server, before)
    rig.reset()
    with database.server.connect(database.name) as again:
        left = pending(again)
        assert fill(again) == (left, 0, 0)
        assert leftovers(again) == {}
    assert all(texts > 1 for _, texts in rig.encodings())


@pytest.mark.parametrize(("cluster", "suspected"), [("autoembed.cluster()", True), ("'7000000000/00000001'", False)])
def test_flights_of_another_cluster_are_discarded(
    db: Connection, connect: Connect, declared: Knowledge, rig: Rig, cluster: str, suspected: bool
) -> None:
    declared(16)
    db.execute(
        sql.SQL(
            "insert into autoembed.inflight (registration, cluster, alone, keys, hashes)"
            " select r.id, {}, false, array['[1]', '[2]']::jsonb[],"
            " (select array_agg(autoembed.hash(k.content) order by k.id) from knowledge k where k.id < 3)"
            " from autoembed.registration r"
        ).format(sql.SQL(cluster))
    )
    assert fill(db) == (16, 0, 0)
    assert sum(texts == 1 for _, texts in rig.encodings()) == (2 if suspected else 0)
    assert leftovers(db) == {}


@pytest.mark.slow
def test_power_cut(own_rig: Callable[..., Rig]) -> None:
    rig = own_rig()
    connection = rig.server.connect()
    connection.execute("create table knowledge (id int primary key, content text, embedding vector(384))")
    connection.execute("insert into knowledge select g, 'text ' || g from generate_series(1, 100) g")
    connection.execute("select embed_column('knowledge', 'content'::name)")
    rig.pace(0.05)
    filling = Filling(connection, batch=16)
    rig.wait_for_encoding(filling.pid, 6)
    rig.server.kill()
    filling.wait()
    rig.reset()
    rig.server.start()
    with rig.server.connect() as db:
        left = pending(db)
        assert fill(db) == (left, 0, 0)
        assert leftovers(db) == {}
        assert scalar(db, "select count(*) from knowledge where embedding is distinct from embed(content)") == 0
