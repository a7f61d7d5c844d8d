"""What psql shows of an error that the product raises on purpose: ERROR, DETAIL, HINT, and no traceback."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import psycopg
import pytest
from psycopg.errors import Diagnostic

from support.rigging import Rig, rows, scalar
from support.server import Connection, Server
from support.talk import notices

pytest_plugins = ["support.rig"]

Connect = Callable[..., Connection]
Knowledge = Callable[..., str]


@pytest.fixture
def server(rig: Rig) -> Server:
    return rig.server


@pytest.fixture
def docs(declared: Knowledge) -> str:
    return declared(3)


def refused(connection: Connection, statement: str) -> Diagnostic:
    """The fields of the error that the statement ends with; none of them is Python's."""
    with pytest.raises(psycopg.Error) as caught:
        connection.execute(statement.encode())
    said = caught.value.diag
    assert "Traceback" not in str(said.context), said.context
    assert "PL/Python" not in str(said.context), said.context
    assert "autoembed:" not in str(said.message_primary)
    return said


REFUSED = {
    # statement: SQLSTATE, message, hint
    "select embed('a', 'no-such')": ("22023", 'model "no-such" is not in the model directory', "There are: "),
    "select embed(array['a'], 'no-such')": ("22023", 'model "no-such" is not in the model directory', ""),
    "select embed('a', 'stub-16', 'poem')": ("22023", "model stub-16 has no prompt named poem", "Its prompts are"),
    "select embed(array[array['a']])": ("2202E", "the array of texts has more than one dimension", ""),
    "select embed('raiseword')": ("38000", "text 1 could not be embedded: the encoder raised ValueError", ""),
    "select embed('hugeword')": ("53200", "text 1 could not be embedded: there is not enough memory", ""),
    "select embed_load('no-such')": ("22023", 'model "no-such" is not in the model directory', ""),
    "select embed_column('docs', 'content', model => 'no-such')": ("22023", 'model "no-such" is not in', ""),
    "select embed_column_set('knowledge', 'embedding', model => 'no-such')": ("22023", 'model "no-such"', ""),
    "call embed_pending(0)": ("22023", "batch is 0", "batch is 1 to 512."),
    "call embed_pending(max_rows => -1)": ("22023", "max_rows is -1", "max_rows is 0 or more"),
    "call embed_worker(513)": ("22023", "batch is 513", "batch is 1 to 512."),
    "call embed_worker(workers => 0)": ("22023", "workers is 0", "workers is 1 to 64."),
    "call embed_wait('knowledge', '-1 s')": ("22023", "timeout is -00:00:01", "timeout is 0 or more."),
    "call embed_wait(null)": ("22004", "relation and timeout must not be null", ""),
    "call embed_wait('knowledge', '0 s')": ("57014", "rows of knowledge are still pending", "Is a worker at work"),
    "begin; call embed_pending()": ("2D000", "embed_pending commits after each batch", "Call it outside BEGIN"),
    "begin; call embed_worker()": ("2D000", "embed_worker commits after each batch", "Call it outside BEGIN"),
    "begin; call embed_wait('knowledge')": ("2D000", "embed_wait commits between its looks", "Call it outside BEGIN"),
    "call embed_pending(relation => 'docs')": ("42704", "relation public.docs has no column declared", "Declare one"),
    "call embed_wait('docs')": ("42704", "relation public.docs has no column declared", "Declare one"),
}


@pytest.mark.parametrize("statement", REFUSED)
def test_refusal_has_no_traceback(db: Connection, docs: str, statement: str) -> None:
    db.execute("create table docs (id int primary key, content text, embedding vector(384))")
    said = refused(db, statement)
    sqlstate, message, hint = REFUSED[statement]
    assert said.sqlstate == sqlstate
    assert message in str(said.message_primary)
    assert hint in str(said.message_hint or "")


def test_superusers_call_on_anothers_table(db: Connection, role: Callable[..., str], connect: Connect) -> None:
    role("alice")
    declaring = "select oid::regprocedure::text from pg_proc where proname = 'embed_column'"
    for (function,) in rows(db, declaring):
        db.execute(f"grant execute on function {function} to alice".encode())
    alice = connect("alice")
    alice.execute("create table hers (id int primary key, content text, embedding vector(384))")
    alice.execute("select embed_column('hers', 'content'::name)")
    schema = scalar(alice, "select current_schema()")
    said = refused(db, f"call embed_pending(relation => '{schema}.hers')")
    assert said.sqlstate == "42501"
    assert "a superuser does not fill" in str(said.message_primary)
    assert "a trigger can RESET ROLE" in str(said.message_detail)
    assert said.message_hint == "Connect as alice."


LONG = "select embed(array(select 'text ' || g from generate_series(1, 40) g))"


@pytest.mark.parametrize("statement", [LONG, "call embed_pending()", "call embed_worker()"])
def test_timeout(db: Connection, declared: Knowledge, rig: Rig, statement: str) -> None:
    """In the server's own words: nothing of a table's was running."""
    declared(40)
    rig.pace(0.2)
    db.execute("set statement_timeout = '300ms'")
    said = refused(db, statement)
    assert said.sqlstate == "57014"
    assert said.message_primary == "canceling statement due to statement timeout"


@pytest.mark.parametrize("statement", [LONG, "call embed_pending()", "call embed_worker()"])
def test_cancel(db: Connection, connect: Connect, declared: Knowledge, rig: Rig, statement: str) -> None:
    declared(40)
    session = connect()
    pid = session.info.backend_pid
    rig.hold(pid)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(refused, session, statement)
        rig.wait_for_encoding(pid)
        db.execute("select pg_cancel_backend(%s)", [pid])
        rig.let_go()
        said = running.result()
    assert said.sqlstate == "57014"
    assert said.message_primary == "canceling statement due to user request"


def test_timeout_of_a_wait(db: Connection, docs: str) -> None:
    db.execute("set statement_timeout = '200ms'")
    said = refused(db, "call embed_wait('knowledge')")
    assert said.sqlstate == "57014"
    assert said.message_primary == "canceling statement due to statement timeout"


def test_cancel_in_immediate_mode(db: Connection, docs: str, rig: Rig) -> None:
    db.execute("select embed_column_set('knowledge', 'embedding', mode => 'immediate')")
    rig.pace(0.2)
    db.execute("set statement_timeout = '300ms'")
    said = refused(db, "insert into knowledge (content) select 'text ' || g from generate_series(1, 40) g")
    assert said.sqlstate == "57014"
    assert said.message_primary == "canceling statement due to statement timeout"
    assert "embed_rows() line" in str(said.context)


def raising(db: Connection, sqlstate: str) -> None:
    """A trigger that imitates the server, and quotes the row."""
    db.execute(
        f"""create function pg_temp.refuse() returns trigger language plpgsql as $$ begin
            raise exception 'canceling statement due to out of memory, deadlock detected: %', new.content
            using errcode = '{sqlstate}', hint = new.content, detail = new.content;
        end $$""".encode()
    )
    db.execute("create trigger refuse before update on knowledge for each row execute function pg_temp.refuse()")


@pytest.mark.parametrize("sqlstate", ["53200", "57014", "40001", "25006", "53100", "XX000", "42501", "42P01", "0A000"])
def test_no_trigger_speaks_in_the_servers_name(db: Connection, docs: str, sqlstate: str) -> None:
    """It can choose any SQLSTATE and any words: those that are shown are ours."""
    db.execute("update knowledge set content = 'a secret' where id = 1")
    raising(db, sqlstate)
    with notices(db) as heard, suppress(psycopg.Error):
        db.execute("call embed_pending(2)")
    said = refused(db, "call embed_pending(2)") if sqlstate != "42501" else None
    failures = rows(db, "select message from embedding_failures")
    shown = (said.message_primary, said.message_detail, said.message_hint) if said else ()
    for text in (*heard, *shown, failures):
        assert "secret" not in str(text)
        assert "canceling statement" not in str(text)
    if said is not None:
        assert said.sqlstate == sqlstate
        assert said.message_primary
    else:
        assert len(failures) == 3  # a policy may refuse a row by it: such a row's own


def test_unforeseen_error_keeps_its_traceback(db: Connection, docs: str) -> None:
    db.execute("select embed('a')")
    db.execute("do language plpython3u $$ GD['autoembed 1'].models = None $$")
    for statement in ("select embed('a')", "call embed_pending()"):
        with pytest.raises(psycopg.errors.ExternalRoutineException, match="AttributeError") as caught:
            db.execute(statement.encode())
        assert "Traceback (most recent call last)" in str(caught.value.diag.context)


def test_package_of_another_version(db: Connection, docs: str) -> None:
    """Is refused by whatever of it is called; writes go on."""
    db.execute("select embed_column_set('knowledge', 'embedding', mode => 'immediate')")
    db.execute(
        """do language plpython3u $$
        plpy.execute("select autoembed.start()")
        from autoembed.server.session import start
        start(plpy, GD, 2)
        GD["autoembed 1"] = GD["autoembed 2"]
        $$"""
    )
    for statement in (
        "select embed('a')",
        "select embed(array['a'])",
        "select embed_load()",
        "select embed_unload()",
        "call embed_pending()",
        "call embed_worker()",
        "call embed_wait('knowledge')",
        "select * from embedding_models",
        "select * from embedding_settings",
        "select * from embedding_sessions",
    ):
        said = refused(db, statement)
        assert said.sqlstate == "55000"
        assert said.message_primary == "the extension's SQL speaks version 2 and the Python package version 1"
        assert "make install" in str(said.message_hint)
    with notices(db) as heard:
        db.execute("insert into knowledge (content) values ('new')")
    assert [str(notice.message) for notice in heard] == [
        "new rows stay pending: the extension's SQL speaks version 2 and the Python package version 1"
    ]
    assert scalar(db, "select count(*) from knowledge where content = 'new' and embedding is null") == 1
