"""Templates: the text that is embedded is made of columns, line by line, and follows them wherever they go."""

from __future__ import annotations

import pytest

from support.server import Connection
from support.talk import column, refusal, scalar

pytest_plugins = ["support.warm"]

TEMPLATE = r"Function {name}: {doc}\n{body}"
CODE = "create table code (id int primary key, name text, doc text, body text, embedding vector(32))"
DECLARE = """select embed_column('code', array['name', 'doc', 'body'], model => 'tiny-mpnet', template => %s)"""
CONTENT = "select (autoembed.column_sql_of(id)).content from autoembed.registration where relation = 'code'::regclass"


def contents(connection: Connection) -> list[str | None]:
    """The texts that are embedded, by the rows' order."""
    return column(connection, f"select {scalar(connection, CONTENT)} from code t order by id")


@pytest.fixture
def code(warm: Connection) -> Connection:
    warm.execute(CODE)
    return warm


@pytest.mark.parametrize(
    ("template", "row", "text"),
    [
        (TEMPLATE, ("f", "adds", "return 1"), "Function f: adds\nreturn 1"),
        (TEMPLATE, ("f", None, "return 1"), "Function f: \nreturn 1"),
        (TEMPLATE, (None, None, "return 1"), "return 1"),
        (TEMPLATE, (None, None, None), None),
        (TEMPLATE, (" ", None, "\n"), None),
        ("{name}\n\n{doc} {body}", ("f", "a", "b"), "f\n\na b"),
        ("{{{name}}} 'it''s' %s {doc}{body}", ("f", "a", "b"), "{f} 'it''s' %s ab"),
        ("{name}{doc}{body}", ("{doc}", "\\n", "$1"), "{doc}\\n$1"),
    ],
)
def test_text_of_a_row(
    code: Connection, template: str, row: tuple[str | None, str | None, str | None], text: str | None
) -> None:
    code.execute(DECLARE, [template])
    code.execute("insert into code values (1, %s, %s, %s)", row)
    assert contents(code) == [text]
    code.execute("call embed_pending()")
    if text is None:
        assert column(code, "select embedding from code") == [None]
    else:
        query = "select embedding <-> embed(%s, 'tiny-mpnet', 'document') < 1e-5 from code"
        assert scalar(code, query, [text])


def test_template_of_many_lines_and_pieces(code: Connection) -> None:
    lines = ["{name} {doc} {body}", *(f"line {n} {{name}}" for n in range(150)), "{doc}-" * 120]
    code.execute(DECLARE, ["\n".join(lines)])
    code.execute("insert into code values (1, 'f', 'd', 'b')")
    expected = ["f d b", *(f"line {n} f" for n in range(150)), "d-" * 120]
    assert contents(code) == ["\n".join(expected)]


@pytest.mark.parametrize(
    ("template", "sqlstate", "words"),
    [
        ("{name} {doc}", "22023", "does not name source column body"),
        ("{name} {doc} {body} {id}", "42703", "names id, which is no source column"),
        ("{name} {doc} {body} {}", "42703", "no source column"),
        ("{name} {doc} {body} {", "22023", "a brace without its other one"),
        ("{name} {doc} {body} }", "22023", "a brace without its other one"),
    ],
)
def test_template_that_is_none(code: Connection, template: str, sqlstate: str, words: str) -> None:
    error = refusal(code, DECLARE, [template])
    assert error.sqlstate == sqlstate
    assert words in str(error.diag.message_primary)
    assert error.diag.message_hint


def test_it_follows_its_columns_and_a_restore(code: Connection) -> None:
    code.execute(DECLARE, [TEMPLATE])
    code.execute("insert into code values (1, 'f', 'adds', 'return 1')")
    code.execute("alter table code rename doc to docstring")
    assert contents(code) == ["Function f: adds\nreturn 1"]
    trigger = scalar(code, "select pg_get_triggerdef(oid) from pg_trigger where tgname = '~autoembed_embedding'")
    code.execute("select embed_column_drop('code')")
    code.execute(trigger)
    assert contents(code) == ["Function f: adds\nreturn 1"]


def test_another_template_clears(code: Connection) -> None:
    code.execute(DECLARE, [TEMPLATE])
    code.execute("insert into code values (1, 'f', 'adds', 'return 1')")
    code.execute("call embed_pending()")
    code.execute("select embed_column_set('code', 'embedding', writes => 'anyone')")
    assert scalar(code, "select embedding is not null from code")
    code.execute("select embed_column_set('code', 'embedding', template => '{name} {doc} {body}')")
    assert scalar(code, "select embedding is null from code")
    assert contents(code) == ["f adds return 1"]
    code.execute("select embed_column_set('code', 'embedding', template => '')")
    assert contents(code) == ["f\nadds\nreturn 1"]
