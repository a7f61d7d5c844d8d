"""What a claim reads does not grow with the table (pages are counted, not milliseconds); the frontier loses no row."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from psycopg import sql

from conftest import Database
from support.rigging import Rig, fill, pending, rows, scalar
from support.server import Connection, Server
from support.talk import notices

pytest_plugins = ["support.rig"]

Connect = Callable[..., Connection]
HELD = 3_000
MUCH = 20_500
STRETCH = MUCH / 500
"""Pages of their index entries, at the least: some 400 fit on one."""


@pytest.fixture
def server(rig: Rig) -> Server:
    return rig.server


@pytest.fixture
def owner(database: Database, db: Connection, connect: Connect) -> Connection:
    """An ordinary owner's connection: row-level security applies to him."""
    role = f"{database.name}_owner"
    db.execute(sql.SQL("create role {} login").format(sql.Identifier(role)))
    database.roles.append(role)
    db.execute(sql.SQL("grant create on schema public to {}").format(sql.Identifier(role)))
    db.execute(sql.SQL("grant execute on all routines in schema public to {}").format(sql.Identifier(role)))
    return connect(role)


def declare(connection: Connection, count: int, *, key: str = "id bigint primary key") -> None:
    connection.execute(
        f"create table knowledge ({key}, content text, embedding vector(384)) with (autovacuum_enabled = off)"
    )
    connection.execute("select embed_column('knowledge', 'content'::name, writes => 'anyone')")
    add(connection, 1, count)


def add(connection: Connection, first: int, last: int) -> None:
    connection.execute(
        f"insert into knowledge select g, 'text ' || g || repeat(' more', 40) from generate_series({first}, {last}) g"
    )


def fill_by_sql(connection: Connection, condition: str) -> None:
    vector = "array_fill(0.05::float4, array[384])::vector"
    connection.execute(f"update knowledge set embedding = {vector} where {condition}")


def fail_all(connection: Connection) -> None:
    """Every pending row, as after its fifth try."""
    connection.execute(
        "insert into autoembed.failure (registration, key, hash, kind, message, attempts)"
        " select r.id, jsonb_build_array(k.id), autoembed.hash(k.content), 'encoder', 'made up', 5"
        " from knowledge k, autoembed.registration r where k.embedding is null",
    )


def pages(connection: Connection, after: str | None = None) -> int:
    """How many pages finding the next 32 rows touches, plans and checks of rights included."""
    return touched(
        connection, "select c.cursor from {}, autoembed.candidates(s.column_sql::autoembed.column_sql, %s, 32) c", after
    )


def pages_of_a_look(connection: Connection) -> int:
    """How many pages the question touches whether a row is to be tried."""
    return touched(connection, "select autoembed.any_due(s.column_sql::autoembed.column_sql) from {}")


def touched(connection: Connection, query: str, *arguments: object) -> int:
    query = query.format("autoembed.columns('knowledge'::regclass) s")
    connection.execute("set plan_cache_mode = force_custom_plan")
    with connection.cursor() as cursor:
        for _ in range(2):  # the first fills the session's caches of catalogs
            plan = cursor.execute(
                f"explain (analyze, buffers, format json, timing off) {query}".encode(), arguments
            ).fetchone()
    assert plan is not None
    top = plan[0][0]["Plan"]
    return int(top["Shared Hit Blocks"]) + int(top["Shared Read Blocks"])


def rows_of_each_statement(connection: Connection, call: str) -> list[int]:
    """How many rows the nodes of each plan that the call runs look at, all together."""
    settings = {
        "log_min_duration": "0", "log_analyze": "on", "log_timing": "off", "log_nested_statements": "on",
        "log_format": "json",
    }  # fmt: skip
    connection.execute("load 'auto_explain'")
    for name, setting in settings.items():
        connection.execute(f"set auto_explain.{name} = {setting}")
    connection.execute("set client_min_messages = log")
    with notices(connection) as heard:
        connection.execute(call)
    plans = [str(each.message).partition("plan:\n")[2] for each in heard]
    return [sum(rows_seen(json.loads(plan)["Plan"])) for plan in plans if plan]


def rows_seen(node: dict[str, Any]) -> Iterator[int]:
    removed = sum(count for name, count in node.items() if name.startswith("Rows Removed by"))
    yield int((node["Actual Rows"] + removed) * node["Actual Loops"])
    for each in node.get("Plans", ()):
        yield from rows_seen(each)


def frontier(connection: Connection) -> list[object] | None:
    found = rows(connection, "select key from autoembed.frontier")
    return found[0][0] if found else None


# --- pages that a claim reads --------------------------------------------------------------------------------------


def test_claim_reads_no_more_in_a_larger_table(db: Connection) -> None:
    declare(db, 2_000)
    db.execute("analyze knowledge")  # of a time when every row was pending
    fill_by_sql(db, "id % 20 <> 0")
    small = pages(db)
    add(db, 2_001, 30_000)
    fill_by_sql(db, "id > 2000 and id % 300 <> 0")
    pages(db)  # marks the dead entries
    old = pages(db)
    db.execute("vacuum analyze knowledge")
    assert old < small + 150
    assert pages(db) < small + 60


def test_claim_after_many_rows_were_filled_without_vacuum(db: Connection) -> None:
    declare(db, 20_000)
    fill_by_sql(db, "id <= 19000")
    first, later = pages(db), pages(db, "[19000]")  # after one that has marked the dead entries
    db.execute("vacuum analyze knowledge")
    clean = pages(db)
    assert first < clean + 19_000 / 200  # 16 bytes an entry: some 400 of them on a page
    assert later < clean + 10


def test_owner_who_is_no_superuser_reads_no_more_failures_than_he_passes(db: Connection, owner: Connection) -> None:
    declare(owner, 4 * HELD)
    fail_all(db)
    assert pages(owner) < 10 * 1024  # rows that a claim passes at most; a few pages of three indexes for each


def test_each_statement_of_a_large_batch_is_linear_in_its_rows(db: Connection) -> None:
    declare(db, 512)
    seen = rows_of_each_statement(db, "call embed_pending(512)")
    assert pending(db) == 0
    assert len(seen) > 10
    assert max(seen) < 20 * 512


# --- the frontier --------------------------------------------------------------------------------------------------


def test_next_call_begins_behind_a_stretch_of_failures(db: Connection, owner: Connection, rig: Rig) -> None:
    declare(owner, HELD)
    fail_all(db)
    assert fill(owner) == (0, 0, 0)
    assert frontier(owner) == [HELD]
    add(owner, HELD + 1, HELD + 40)
    walked = pages(owner)
    assert pages(owner, f"[{HELD}]") < walked / 4
    assert fill(owner) == (40, 0, 0)


def test_rows_below_the_frontier_are_found_by_the_next_call(db: Connection) -> None:
    declare(db, HELD)
    fail_all(db)
    fill(db)
    db.execute("update knowledge set content = 'changed' where id = 500")
    db.execute("insert into knowledge values (-5, 'before all')")
    db.execute("update autoembed.failure set next_try = now() where key = '[7]'")
    assert fill(db) == (3, 0, 0)
    assert frontier(db) == [HELD]


def test_frontier_goes_with_the_failures(db: Connection) -> None:
    declare(db, HELD)
    fail_all(db)
    fill(db)
    assert frontier(db) is not None
    assert scalar(db, "select embed_retry('knowledge')") == HELD
    assert fill(db, batch=512) == (HELD, 0, 0)
    assert frontier(db) is None


def test_calls_that_are_cut_short_come_round_to_each_row(db: Connection) -> None:
    declare(db, HELD)
    fail_all(db)
    fill(db)
    db.execute("update knowledge set content = 'changed' where id in (10, 2900)")
    add(db, HELD + 1, HELD + 4)
    done = [fill(db, batch=2, max_rows=2) for _ in range(4)]
    assert done == [(2, 0, 0), (2, 0, 0), (2, 0, 0), (0, 0, 0)]
    assert pending(db) == HELD - 2


def test_a_call_cut_short_behind_held_rows_goes_on_there(db: Connection) -> None:
    """To walk a long stretch again for each of them would take the time that they have."""
    declare(db, HELD)
    fail_all(db)
    fill(db)
    add(db, HELD + 1, HELD + 6)
    for done in (2, 4):
        assert fill(db, batch=2, max_rows=2) == (2, 0, 0)
        assert frontier(db) == [HELD + done]


def test_blank_rows_that_the_index_holds_are_passed_too(db: Connection) -> None:
    declare(db, 0)
    db.execute(f"insert into knowledge select g, repeat(' ', 100) from generate_series(1, {HELD}) g")
    assert fill(db) == (0, 0, 0)
    assert frontier(db) == [scalar(db, "select max(id) from knowledge")]
    add(db, HELD + 1, HELD + 1)
    db.execute("update knowledge set content = 'a text' where id = 9")
    assert fill(db) == (2, 0, 0)


def fill_much_by_sql(connection: Connection) -> None:
    """So many that the index entries which they leave dead are a stretch; a few rows at the end are left."""
    fill_by_sql(connection, f"id <= {MUCH}")
    connection.execute("select pg_stat_force_next_flush()")
    assert scalar(connection, "select pg_stat_get_dead_tuples('knowledge'::regclass)") == MUCH


def test_next_call_begins_behind_a_stretch_of_dead_entries_until_a_vacuum(db: Connection) -> None:
    declare(db, MUCH + 40)
    fill_much_by_sql(db)
    assert fill(db) == (40, 0, 0)
    assert frontier(db) == [MUCH + 40]
    pages(db)  # marks the dead entries
    add(db, MUCH + 41, MUCH + 80)
    assert pages(db, f"[{MUCH + 40}]") < pages(db) - STRETCH
    looked = pages_of_a_look(db)
    db.execute("delete from autoembed.frontier")
    assert looked < pages_of_a_look(db) - STRETCH
    db.execute("update knowledge set content = 'changed' where id = 7")
    assert fill(db) == (41, 0, 0)
    assert frontier(db) == [MUCH + 80]
    db.execute("update knowledge set content = 'changed again' where id = 7")
    assert fill(db) == (1, 0, 0)
    assert frontier(db) == [MUCH + 80]
    db.execute("vacuum knowledge")
    assert fill(db) == (0, 0, 0)
    assert frontier(db) is None


def test_a_call_counts_the_dead_rows_that_it_makes_itself(db: Connection) -> None:
    """A backend tells its statistics when it is idle; a worker never is."""
    declare(db, MUCH + 40)
    update = f"update knowledge set embedding = array_fill(0.05::float4, array[384])::vector where id <= {MUCH}"
    db.execute(
        "create procedure much() language plpgsql as $$ declare n bigint; begin"
        f" {update}; commit; call embed_pending(32, 'knowledge', null, null, n, n, n, n); end $$"
    )
    db.execute("call much()")
    assert frontier(db) == [MUCH + 40]


def test_partitions_dead_rows_count_together(db: Connection) -> None:
    db.execute(
        "create table knowledge (id bigint primary key, content text, embedding vector(384)) partition by range (id)"
    )
    for part, (first, last) in enumerate(((0, MUCH // 2), (MUCH // 2, MUCH * 2))):
        db.execute(f"create table part{part} partition of knowledge for values from ({first}) to ({last})")
    db.execute("select embed_column('knowledge', 'content'::name, writes => 'anyone')")
    add(db, 1, MUCH + 4)
    fill_by_sql(db, f"id <= {MUCH}")
    assert fill(db) == (4, 0, 0)
    assert frontier(db) == [MUCH + 4]


def test_first_rows_take_turns_with_those_behind_a_frontier(db: Connection) -> None:
    declare(db, MUCH + 4)
    fill_much_by_sql(db)
    fill(db)
    add(db, MUCH + 5, MUCH + 100)  # more than the next calls may embed
    db.execute("update knowledge set content = 'changed' where id in (7, 8)")
    done = [fill(db, batch=2, max_rows=2) for _ in range(2)]
    assert done == [(2, 0, 0), (2, 0, 0)]
    assert rows(db, "select id from knowledge where embedding is null and id < 10") == []


def test_frontier_of_a_former_key_is_none(db: Connection) -> None:
    declare(db, HELD)
    fail_all(db)
    fill(db)
    db.execute("alter table knowledge drop constraint knowledge_pkey")
    db.execute("alter table knowledge add column name uuid primary key default gen_random_uuid()")
    db.execute("select embed_column('knowledge', 'content'::name, if_not_exists => true)")
    assert fill(db, batch=512, max_rows=600) == (600, 0, 0)
    assert pending(db) == HELD - 600


def test_two_workers_behind_one_frontier(db: Connection, connect: Connect) -> None:
    declare(db, HELD)
    fail_all(db)
    fill(db)
    add(db, HELD + 1, HELD + 300)
    done: list[tuple[int, ...]] = []
    connections = [connect(), connect()]
    workers = [threading.Thread(target=lambda c=c: done.append(fill(c, batch=8))) for c in connections]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert sum(each[0] for each in done) == 300
    assert pending(db) == HELD
    assert frontier(db) == [HELD]
