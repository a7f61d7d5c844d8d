"""Logical replication of all tables: a server's state stays its own, and no subscription stops because of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from support.rigging import Rig, fill, rows, scalar
from support.server import Connection, wait_until

pytest_plugins = ["support.rig"]

TABLES = ("declared", "published", "plain")
DECLARE = "select embed_column('{}', 'content'::name)"


@pytest.fixture
def pair(own_rig: Callable[..., Rig]) -> Iterator[tuple[Connection, Connection]]:
    """A publisher and a subscriber: one table is declared on both, one on the publisher alone, one on neither."""
    publisher = own_rig({"wal_level": "logical"}).server
    one, other = publisher.connect(), own_rig({"wal_level": "logical"}).server.connect()
    for connection in (one, other):
        for table in TABLES:
            connection.execute(
                f"create table {table} (id int primary key, content text, embedding vector(384))".encode()
            )
        connection.execute(DECLARE.format("declared").encode())
    one.execute(DECLARE.format("published").encode())
    for table in TABLES:
        one.execute(f"insert into {table} values (1, 'one')".encode())
    fill(one)
    one.execute("create publication everything for all tables")
    other.execute(f"create subscription mine connection '{publisher.dsn()}' publication everything".encode())
    yield one, other
    other.execute("drop subscription mine")
    one.close()
    other.close()


def wait_for_changes(one: Connection, other: Connection) -> None:
    """All that the publisher has written is with the subscriber."""
    one.execute("create table if not exists mark (id int primary key)")
    written = scalar(one, "select pg_current_wal_lsn()")
    wait_until(lambda: scalar(one, "select bool_and(replay_lsn >= %s) from pg_stat_replication", written))
    wait_until(lambda: scalar(other, "select bool_and(srsubstate = 'r') from pg_subscription_rel"))


def test_state_stays_on_its_server(pair: tuple[Connection, Connection]) -> None:
    one, other = pair
    registered = rows(other, "select id, relation, row_trigger from autoembed.registration")
    wait_for_changes(one, other)
    for table in TABLES:
        one.execute(f"insert into {table} values (2, 'two'), (3, 'raiseword')".encode())
    fill(one)
    one.execute("update declared set content = 'changed' where id = 1")
    fill(one)
    one.execute("select embed_column_set('published', 'embedding', enabled => false)")
    one.execute("select embed_column_drop('published')")
    wait_for_changes(one, other)
    for table in TABLES:
        assert scalar(other, f"select count(*) from {table}") == 3
    assert scalar(other, "select content from declared where id = 1") == "changed"
    assert scalar(other, "select count(embedding) from declared") == 2
    assert rows(other, "select id, relation, row_trigger from autoembed.registration") == registered
    for state in ("run", "failure", "inflight", "truncation", "request"):
        assert scalar(other, f"select count(*) from autoembed.{state}") == 0
    assert rows(other, "select apply_error_count, sync_error_count from pg_stat_subscription_stats") == [(0, 0)]


def test_subscriber_has_state_of_its_own(pair: tuple[Connection, Connection]) -> None:
    one, other = pair
    wait_for_changes(one, other)
    other.execute("insert into declared values (10, 'ten')")
    assert fill(other)[0] == 1
    assert scalar(other, "select count(*) from autoembed.run") == 1


def test_loader_declares_and_fills(pair: tuple[Connection, Connection]) -> None:
    """A client's session whose role is replica is no subscription's."""
    one, _ = pair
    one.execute("set session_replication_role = replica")
    one.execute(DECLARE.format("plain").encode())
    assert fill(one)[0] == 1
    assert scalar(one, "select count(*) from embedding_columns where relation = 'plain'::regclass") == 1
