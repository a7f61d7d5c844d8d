"""What a session has loaded: embed_load, embed_unload, how many models and megabytes, and who sees it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from psycopg import errors

from support.rigging import Rig, fill, rows, scalar
from support.server import Connection, Server, wait_until
from support.stubs import add_stub

pytest_plugins = ["support.rig"]

Connect = Callable[..., Connection]
SESSIONS = "select model, texts from embedding_sessions where pid = %s order by model"


@pytest.fixture
def server(rig: Rig) -> Server:
    return rig.server


def loaded(db: Connection, connection: Connection) -> dict[str, int]:
    return dict(rows(db, SESSIONS, connection.info.backend_pid))


def test_loads_counts_and_unloads(db: Connection, connect: Connect) -> None:
    session = connect()
    assert loaded(db, session) == {}
    assert scalar(session, "select embed_load()") == "stub-384"
    assert loaded(db, session) == {"stub-384": 0}
    session.execute("select embed('one'), embed(array['two', 'three'])")
    assert loaded(db, session) == {"stub-384": 3}
    session.execute("select embed('one', 'stub-16')")
    assert loaded(db, session) == {"stub-384": 3, "stub-16": 1}
    assert scalar(session, "select embed_unload()") == 2
    assert loaded(db, session) == {}
    assert scalar(session, "select embed_unload()") == 0
    session.execute("select embed('again')")
    assert loaded(db, session) == {"stub-384": 1}


def test_texts_of_each_kind_of_call_are_counted(db: Connection, declared: Callable[..., str]) -> None:
    name = declared(texts=["one", "two", "raiseword", "three", "four"])
    fill(db, batch=2)
    assert loaded(db, db) == {"stub-384": 5}
    scalar(db, "select embed_column_set(%s::regclass, 'embedding', mode => 'immediate')::text", name)
    db.execute(f"insert into {name} (content) values ('five'), ('six')")
    assert loaded(db, db) == {"stub-384": 7}
    db.execute("select embed('seven'), embed(array['eight', null, 'eight'])")
    assert loaded(db, db) == {"stub-384": 10}


def test_least_recently_used_goes_first(db: Connection, connect: Connect, rig: Rig) -> None:
    add_stub(rig.models, "stub-fourth")
    session = connect()
    for model in ("stub-384", "stub-other", "stub-16", "stub-384", "stub-fourth"):
        session.execute("select embed('a text', %s)", [model])
    assert loaded(db, session) == {"stub-384": 2, "stub-16": 1, "stub-fourth": 1}


def test_memory_is_capped(own_rig: Callable[..., Rig]) -> None:
    """Others go first; what does not fit alone is refused."""
    rig = own_rig()
    for name, megabytes in (("stub-a", 6), ("stub-b", 6), ("stub-huge", 11)):
        add_stub(rig.models, name, weights="x" * (megabytes << 20))
    rig.server.stop()
    rig.server.environment["EMBEDDING_MAX_MEMORY_MB"] = "10"
    rig.server.start()
    with rig.server.connect() as session:
        for model in ("stub-a", "stub-b", "stub-a"):
            session.execute("select embed_load(%s)", [model])
            assert list(loaded(session, session)) == [model]
        with pytest.raises(errors.OutOfMemory, match="weights take 11 MB") as caught:
            session.execute("select embed_load('stub-huge')")
        assert "EMBEDDING_MAX_MEMORY_MB" in str(caught.value.diag.message_hint)
        assert list(loaded(session, session)) == ["stub-a"]


def test_pages_of_dead_sessions_are_removed(db: Connection, connect: Connect, rig: Rig) -> None:
    directory = Path(rig.server.directory) / "data" / "pg_stat_tmp"
    session = connect()
    session.execute("select embed_load()")
    pid = session.info.backend_pid
    assert list(directory.glob(f"autoembed.{pid}.*")) != []
    db.execute("select pg_terminate_backend(%s, 5000)", [pid])
    wait_until(lambda: not Path(f"/proc/{pid}").exists())
    assert loaded(db, session) == {}
    assert list(directory.glob(f"autoembed.{pid}.*")) == []


def test_memory_is_shown(db: Connection, connect: Connect) -> None:
    session = connect()
    session.execute("select embed('a text')")
    [(private, shared, seconds)] = rows(
        db,
        "select private_bytes, shared_bytes, load_time < '1 minute' from embedding_sessions where pid = %s",
        session.info.backend_pid,
    )
    assert private > 1 << 20
    assert shared > 1 << 20
    assert seconds is True


def test_others_sessions_are_seen_by_those_who_may(db: Connection, connect: Connect, role: Callable[..., str]) -> None:
    db.execute("select embed_load()")
    for name in ("alice", "watcher"):
        role(name)
    db.execute("grant execute on function embed_load to alice; grant pg_read_all_stats to watcher")
    db.execute("grant execute on function embed(text, text, text) to alice")
    alice, watcher = connect("alice"), connect("watcher")
    alice.execute("select embed_load()")
    seen = "select pid from embedding_sessions where pid in (%s, %s)"
    both = (db.info.backend_pid, alice.info.backend_pid)
    assert rows(alice, seen, *both) == [(alice.info.backend_pid,)]
    assert len(rows(watcher, seen, *both)) == 2
    assert len(rows(db, seen, *both)) == 2
    with pytest.raises(errors.InsufficientPrivilege):
        watcher.execute("select embed_load()")


def test_no_text_is_written(db: Connection, rig: Rig) -> None:
    db.execute("select embed('a very secret sentence')")
    directory = Path(rig.server.directory) / "data" / "pg_stat_tmp"
    [page] = directory.glob(f"autoembed.{db.info.backend_pid}.*")
    assert b"secret" not in page.read_bytes()
    assert page.stat().st_mode & 0o077 == 0
