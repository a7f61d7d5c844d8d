"""Text is private: whatever goes wrong, no row's text is in a log, an error, a notice, a view or a state table."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import psycopg
import pytest
from psycopg import sql
from psycopg.errors import Diagnostic

from conftest import Database
from support.rigging import Filling, Rig, fill, rows, scalar
from support.server import Connection, Server, wait_until
from support.stubs import add_stub

pytest_plugins = ["support.rig"]

Knowledge = Callable[..., str]
Connect = Callable[..., Connection]

TOKEN = "zyzzyva4711"
FIELDS = [name for name in dir(Diagnostic) if not name.startswith("_")]


@pytest.fixture(scope="module")
def chatty_rig(module_rig: Rig) -> Rig:
    """Its log holds as much as an administrator would ever ask for."""
    with module_rig.server.connect() as db:
        for setting in (
            "log_min_messages = debug1",
            "log_error_verbosity = verbose",
            "log_min_error_statement = debug1",
        ):
            db.execute(f"alter system set {setting}")
        db.execute("select pg_reload_conf()")
    add_stub(module_rig.models, "stub-broken")
    return module_rig


@pytest.fixture
def rig(chatty_rig: Rig) -> Iterator[Rig]:
    chatty_rig.reset()
    yield chatty_rig
    chatty_rig.reset()


@pytest.fixture
def server(rig: Rig) -> Server:
    return rig.server


class Listener:
    """All that the server said to the client, and all that it wrote."""

    def __init__(self, connection: Connection, server: Server) -> None:
        self.connection = connection
        self.server = server
        self.logged = len(server.log)
        self.said: list[str] = []
        connection.add_notice_handler(self.listen)

    def listen(self, diagnostic: Diagnostic) -> None:
        self.said += [str(getattr(diagnostic, field)) for field in FIELDS]

    def attempt(self, statement: str, *parameters: object) -> None:
        """Whatever comes of it."""
        try:
            self.connection.execute(statement, parameters or None)
        except psycopg.Error as error:
            self.listen(error.diag)
            self.said.append(str(error))

    def assert_discreet(self, connection: Connection) -> None:
        for place, text in (("client", "\n".join(self.said)), ("log", self.server.log[self.logged :])):
            assert [line for line in text.splitlines() if TOKEN in line] == [], place
        for relation in state(connection):
            shown = rows(connection, f"select t::text from {relation} t where position(%s in t::text) > 0", TOKEN)
            assert shown == [], relation


def state(connection: Connection) -> list[str]:
    query = (
        "select c.oid::regclass::text from pg_class c where c.relkind in ('r', 'v')"
        " and (c.relnamespace = 'autoembed'::regnamespace or c.relname ~ '^embedding_')"
    )
    found = [name for (name,) in rows(connection, query)]
    assert len(found) >= 13
    return found


@pytest.fixture
def listener(connect: Connect, server: Server) -> Listener:
    return Listener(connect(), server)


def texts(*words: str) -> list[str]:
    return [f"{TOKEN} {word} {n}" for n, word in enumerate(words)]


def test_successes_and_what_the_encoder_refuses(db: Connection, declared: Knowledge, listener: Listener) -> None:
    declared(texts=texts("fine", "raiseword", "nanword", "zeroword", "hugeword", "fine", "word " * 100))
    listener.attempt("call embed_pending()")
    assert scalar(db, "select count(*) from embedding_failures") == 4
    assert scalar(db, "select count(*) from embedding_truncations") == 1
    listener.assert_discreet(db)


REFUSALS = {
    "raise": "raise exception 'not %', new.content using detail = new.content, hint = new.content;",
    "check": "raise exception 'not %', new.content using errcode = '23514', constraint = new.content;",
    "unknown": "raise exception 'not %', new.content using errcode = '22012', detail = new.content;",
    "cast": "perform new.content::integer;",
    "json": "perform new.content::jsonb;",
    "regclass": "perform new.content::regclass;",
    "execute": "execute new.content;",
    "name": "execute format('select %I', new.content);",
    "cancel": "raise exception 'not %', new.content using errcode = '57014';",
    "serialization": "raise exception 'not %', new.content using errcode = '40001', detail = new.content;",
    "denied": "raise exception 'not %', new.content using errcode = '42501', detail = new.content;",
    "class": "raise exception 'not %', new.content using errcode = 'XX000', detail = new.content;",
    "division": "perform 1 / (length(new.content) - length(new.content));",
}


@pytest.mark.parametrize(
    ("refusal", "when"),
    [*((refusal, "before") for refusal in REFUSALS), ("raise", "deferred"), ("unknown", "deferred")],
)
def test_triggers_that_quote_the_row(
    db: Connection, declared: Knowledge, listener: Listener, refusal: str, when: str
) -> None:
    declared(texts=texts("fine", "fine", "fine"))
    body = f"begin if new.id = 2 then {REFUSALS[refusal]} end if; return new; end"
    db.execute(sql.SQL("create function refuse() returns trigger language plpgsql as {}").format(body))
    kind = "trigger refuse before" if when == "before" else "constraint trigger refuse after"
    deferred = "" if when == "before" else "deferrable initially deferred"
    db.execute(f"create {kind} update on knowledge {deferred} for each row execute function refuse()")
    listener.attempt("call embed_pending()")
    listener.attempt("select embed_column_set('knowledge', 'embedding', mode => 'immediate')")
    listener.attempt("update knowledge set content = content || '!' where id <> 2")
    listener.assert_discreet(db)


def test_constraints_that_show_the_row(db: Connection, declared: Knowledge, listener: Listener) -> None:
    declared(texts=texts("fine", "fine"))
    db.execute("alter table knowledge add constraint no_vector check (embedding is null or id <> 1)")
    db.execute("create unique index only_one on knowledge (left(content, 5)) where embedding is not null")
    listener.attempt("call embed_pending()")
    assert scalar(db, "select count(*) from embedding_failures") >= 1
    listener.assert_discreet(db)


def test_immediate_mode(db: Connection, knowledge: Knowledge, listener: Listener) -> None:
    knowledge(1)
    db.execute("alter table knowledge add constraint no_vector check (embedding is null or id <> 3)")
    db.execute("select embed_column('knowledge', 'content'::name, mode => 'immediate')")
    for word in ("fine", "raiseword", "fine"):
        listener.attempt("insert into knowledge (content) values (%s)", f"{TOKEN} {word}")
    db.execute("select embed_column_set('knowledge', 'embedding', model => 'stub-broken')")
    listener.attempt("insert into knowledge (content) values (%s)", f"{TOKEN} fine")
    listener.assert_discreet(db)


def test_functions_called_with_a_text(db: Connection, declared: Knowledge, listener: Listener) -> None:
    declared(texts=texts("fine", "fine"))
    fill(db)
    for word in ("fine", "raiseword", "nanword", "hugeword"):
        listener.attempt("select embed(%s)", f"{TOKEN} {word}")
        listener.attempt("select embed(array[%s, 'other'])", f"{TOKEN} {word}")
        listener.attempt("select distance from embed_search('knowledge', %s)", f"{TOKEN} {word}")
    listener.attempt("select embed(%s, 'stub-broken')", TOKEN)
    listener.attempt("select embed(array[array[%s]])", TOKEN)
    listener.attempt("select distance from embed_search('knowledge', %s, 0)", TOKEN)
    listener.assert_discreet(db)


def test_broken_models(db: Connection, knowledge: Knowledge, listener: Listener) -> None:
    knowledge(texts=texts("fine", "fine"))
    db.execute("select embed_column('knowledge', 'content'::name, model => 'stub-broken')")
    listener.attempt("call embed_pending()")
    listener.assert_discreet(db)


def test_interrupts(db: Connection, declared: Knowledge, listener: Listener) -> None:
    declared(texts=texts(*["fine"] * 30))
    db.execute(
        "create function slow() returns trigger language plpgsql as 'begin perform pg_sleep(0.3); return new; end'"
    )
    db.execute("create trigger slow before update on knowledge for each row execute function slow()")
    listener.attempt("set statement_timeout = '500ms'")
    listener.attempt("call embed_pending()")
    assert any("57014" in said for said in listener.said)
    listener.assert_discreet(db)


def test_crashes(
    database: Database, db: Connection, declared: Knowledge, listener: Listener, rig: Rig, connect: Connect
) -> None:
    declared(texts=texts("fine", "poison", "fine"))
    rig.kill_at("poison")
    for crash in range(4):  # among others, and then alone, three times
        before = rig.server.log.count("reinitializing")
        with database.server.connect(database.name) as connection, pytest.raises(psycopg.OperationalError) as caught:
            fill(connection)
        listener.said.append(f"crash {crash}: {caught.value}")
        wait_until(lambda before=before: rig.server.log.count("reinitializing") > before)  # type: ignore[misc]
        rig.server.wait_until_ready()
    with database.server.connect(database.name) as again:
        assert fill(again) == (1, 0, 0)
        assert scalar(again, "select kind from embedding_failures") == "crashed"
        listener.assert_discreet(again)


def test_flights_that_are_under_way(
    db: Connection, connect: Connect, declared: Knowledge, listener: Listener, rig: Rig
) -> None:
    declared(texts=texts(*["fine"] * 30))
    with rig.encoding(connect()) as filling:
        listener.assert_discreet(db)
        os.kill(filling.pid, signal.SIGTERM)
    assert isinstance(filling, Filling)
    listener.assert_discreet(db)
