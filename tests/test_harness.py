"""The harness itself: where the server runs, as whom, and whose Python it is."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import psutil
import psycopg
import pytest

from support.server import Connection, Server, site, wait_until

IMPORTED_FROM = """
create function pg_temp.imported_from() returns text language plpython3u as $$
plpy.execute("select autoembed.start()")
import autoembed
return autoembed.__file__
$$
"""


def test_server_does_not_run_as_root(server: Server) -> None:
    assert psutil.Process(server.pid).uids().effective != 0


def test_package_comes_from_the_products_site(db: Connection) -> None:
    db.execute(IMPORTED_FROM)
    found = db.execute("select pg_temp.imported_from()").fetchone()
    assert found is not None
    assert Path(found[0]).is_relative_to(site())


def test_each_test_has_its_own_database(db: Connection, knowledge: Callable[..., str]) -> None:
    assert knowledge(rows=3) == "knowledge"
    assert db.execute("select count(*) from knowledge").fetchone() == (3,)


def test_role_works_in_its_own_schema(role: Callable[..., str], connect: Callable[..., Connection]) -> None:
    alice = connect(role("alice"))
    alice.execute("create table mine (id int)")
    assert alice.execute("select 'mine'::regclass::text, current_schema()").fetchone() == ("mine", "alice")


def test_environment_reaches_backends(make_server: Callable[..., Server]) -> None:
    own = make_server({"work_mem": "7MB"}, EMBEDDING_BATCH_SIZE="7")
    environment = "do $$ import os; plpy.notice(os.environ['EMBEDDING_BATCH_SIZE']) $$ language plpython3u"
    with own.connect() as connection:
        notices: list[str | None] = []
        connection.add_notice_handler(lambda notice: notices.append(notice.message_primary))
        connection.execute(environment)
        assert notices == ["7"]
        assert connection.execute("show work_mem").fetchone() == ("7MB",)
        assert connection.execute("show fsync").fetchone() == ("on",)


def test_killed_server_starts_again(make_server: Callable[..., Server]) -> None:
    own = make_server()
    with own.connect() as connection:
        connection.execute("create table kept (id int)")
    own.kill()
    assert not own.running
    own.start()
    with own.connect() as connection:
        assert connection.execute("select 'kept'::regclass::text").fetchone() == ("kept",)
    assert "automatic recovery in progress" in own.log


def test_crashed_backend_restarts_all(make_server: Callable[..., Server]) -> None:
    own = make_server()
    with own.connect() as connection:
        os.kill(connection.info.backend_pid, 9)
        with pytest.raises(psycopg.OperationalError):
            connection.execute("select 1")
    own.wait_until_ready()
    assert "all server processes terminated; reinitializing" in own.log


def test_wait_until_gives_up() -> None:
    with pytest.raises(TimeoutError):
        wait_until(lambda: False, timeout=0.1)
