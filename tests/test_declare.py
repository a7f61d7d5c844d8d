"""Declaring a column: what is accepted under which names, keys and schemas, and what is refused with which words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from support.server import Connection
from support.talk import SIZE, TINY, VECTOR, acting_as, column, notices, refusal, scalar

pytest_plugins = ["support.warm"]

DOCS = "create table docs (id bigint primary key, content text, note text, embedding vector(32))"
DECLARE = "select embed_column('docs', 'content', model => 'tiny-mpnet')"
NO_KEY = "Add one, for example: alter table ... add column id bigint generated always as identity primary key."
TEXT_TYPES = "A source column is of type text, varchar, char, citext or a domain over one of these."
MODES = "The modes are deferred and immediate."
PAIR = sql.SQL("select embed_column({}, {}::name, {}::name, model => 'tiny-mpnet')")


def declared(connection: Connection) -> list[tuple[Any, ...]]:
    """What the test's own schema has declared."""
    return connection.execute(
        "select v.relation::text, v.source::text[], v.target::text, v.model, v.mode, v.enabled, v.dimensions, v.status "
        "from embedding_columns v join pg_class c on c.oid = v.relation "
        "where c.relnamespace = current_schema()::regnamespace order by 1, 3"
    ).fetchall()


def said(connection: Connection, message: str | None) -> str:
    """A message without the schemas' names: tables are named with theirs in some, as the search_path makes it."""
    schema = scalar(connection, "select current_schema()")
    return str(message).replace(f"{schema}.", "").replace("public.", "").removeprefix("autoembed: ")


def fill(connection: Connection) -> int:
    return int(scalar(connection, "call embed_pending()"))


# --- accepted ------------------------------------------------------------------------------------------------------


def test_declared_column_is_listed(warm: Connection) -> None:
    warm.execute(DOCS)
    warm.execute(DECLARE)
    assert declared(warm) == [("docs", ["content"], "embedding", TINY, "deferred", True, SIZE, "ready")]
    on_disk = scalar(warm, "select fingerprint from embedding_models where name = %s", [TINY])
    assert column(warm, "select fingerprint from embedding_columns where relation = 'docs'::regclass") == [on_disk]


def test_default_model_is_the_servers(warm: Connection) -> None:
    warm.execute("create table docs (id bigint primary key, content text, embedding vector(384))")
    warm.execute("select embed_column('docs', 'content')")
    assert [row[3] for row in declared(warm)] == ["all-MiniLM-L6-v2"]


def test_existing_rows_are_pending_and_existing_vectors_kept(warm: Connection) -> None:
    warm.execute(DOCS)
    warm.execute(f"insert into docs values (1, 'one', null, {VECTOR}), (2, 'two', null, null)", [1])
    with notices(warm) as heard:
        warm.execute(DECLARE)
    assert [(said(warm, n.message), said(warm, n.hint)) for n in heard] == [
        (
            "docs.embedding has vectors already: they are kept as they are",
            "If they are not of model tiny-mpnet: update docs set embedding = null",
        )
    ]
    assert fill(warm) == 1
    assert warm.execute("select embedding = " + VECTOR + " from docs order by id", [1]).fetchall() == [
        (True,),
        (False,),
    ]


def test_declaring_an_empty_column_says_nothing(warm: Connection) -> None:
    warm.execute(DOCS)
    with notices(warm) as heard:
        warm.execute(DECLARE)
    assert heard == []


def test_sources_are_joined_by_a_newline(warm: Connection) -> None:
    warm.execute(DOCS)
    warm.execute("insert into docs values (1, 'body', 'head'), (2, null, 'head'), (3, 'body', null), (4, null, ' ')")
    warm.execute("select embed_column('docs', array['note', 'content'], model => 'tiny-mpnet')")
    assert fill(warm) == 3
    texts = ["head\nbody", "head", "body"]
    far = "select d.embedding <-> embed(%s, 'tiny-mpnet', 'document') from docs d where id = %s"
    assert max(scalar(warm, far, [text, key]) for key, text in enumerate(texts, 1)) < 1e-5


def test_two_targets_with_two_models(warm: Connection) -> None:
    warm.execute("create table docs (id int primary key, content text, small vector(32), large vector(384))")
    warm.execute("select embed_column('docs', 'content', 'small', 'tiny-mpnet')")
    warm.execute("select embed_column('docs', 'content', 'large', 'all-MiniLM-L6-v2')")
    assert [row[2:5] for row in declared(warm)] == [
        ("large", "all-MiniLM-L6-v2", "deferred"),
        ("small", TINY, "deferred"),
    ]
    warm.execute("insert into docs values (1, 'one text, two vectors')")
    assert fill(warm) == 2
    warm.execute("update docs set content = 'another text'")
    assert warm.execute("select small, large from docs").fetchone() == (None, None)


def test_every_kind_of_key(warm: Connection) -> None:
    keys = {
        "as_bigint": ("id bigint primary key", "1"),
        "as_text": ("id text primary key", "'it''s \"quoted\", {braced} and \\ slashed'"),
        "as_uuid": ("id uuid primary key", "gen_random_uuid()"),
        "as_varchar": ("id varchar(9) primary key", "'nine'"),
        "as_char": ("id char(9) primary key", "'nine'"),
        "as_numeric": ("id numeric primary key", "1.50"),
        "as_real": ("id double precision primary key", "0.1::float8 + 0.2"),
        "as_moment": ("id timestamptz primary key", "clock_timestamp()"),
        "as_date": ("id date primary key", "current_date"),
        "as_bytes": ("id bytea primary key", "'\\x00ff'"),
        "as_boolean": ("id boolean primary key", "true"),
        "as_enum": ("id mood primary key", "'happy'"),
        "as_domain": ("id small_number primary key", "7"),
        "as_pair": ("a int, b text, primary key (b, a)", "1, 'b'"),
        "as_triple": ("a uuid, b date, c bigint, primary key (a, b, c)", "gen_random_uuid(), current_date, 3"),
        "as_unique": ("id int not null unique", "1"),
        "as_including": ("id int, extra text, primary key (id) include (extra)", "1, 'x'"),
    }
    warm.execute("create type mood as enum ('happy')")
    warm.execute("create domain small_number as int check (value < 10)")
    for table, (columns, values) in keys.items():
        warm.execute(f"create table {table} (content text, embedding vector(32), {columns})")
        warm.execute(f"insert into {table} values ('a text', null, {values})")
        warm.execute("select embed_column(%s::regclass, 'content', model => 'tiny-mpnet')", [table])
    fill(warm)
    unfilled = [t for t in keys if scalar(warm, f"select embedding is null from {t}")]
    assert unfilled == []


@pytest.mark.parametrize("key", ["int[]", "jsonb", "int4range"])
def test_key_that_does_not_go_through_json_is_refused_or_served(warm: Connection, key: str) -> None:
    values = {"int[]": "'{1,2}'", "jsonb": "'\"a\"'", "int4range": "'[1,2)'"}
    warm.execute(f"create table docs (id {key} primary key, content text, embedding vector(32))")
    warm.execute(f"insert into docs values ({values[key]}, 'a text')")
    try:
        warm.execute(DECLARE)
    except psycopg.Error as error:
        assert error.sqlstate == "55000"  # noqa: PT017
    else:
        assert fill(warm) == 1


ALIASES = (
    "t d key c hash n free f u k s r g x old new encoded written vector content target relation model "
    "user order select null text autoembed_new"
)


def test_columns_named_like_the_products_aliases(warm: Connection) -> None:
    """Each name once as key, once as source, once as target; filled, changed and searched."""
    names = ALIASES.split()
    triples = list(zip(names, names[1:] + names[:1], names[2:] + names[:2], strict=True))
    for n, (key, source, target) in enumerate(triples):
        columns = map(sql.Identifier, (f"docs{n}", key, source, target))
        warm.execute(sql.SQL("create table {} ({} int primary key, {} text, {} vector(32))").format(*columns))
        warm.execute(f"insert into docs{n} values (1, 'a text')")
        warm.execute(PAIR.format(f"docs{n}", source, target))
    assert fill(warm) == len(names)
    search = "select key from embed_search(%s::regclass, 'a text', target => %s)"
    change = sql.SQL("update {} set {} = 'another' returning {}")
    for n, (key, source, target) in enumerate(triples):
        assert scalar(warm, search, [f"docs{n}", target]) == {key: 1}
        assert warm.execute(change.format(*map(sql.Identifier, (f"docs{n}", source, target)))).fetchone() == (None,)


AWKWARD = ("Täble; drop", 'quo"ted', "it's", "with space", "UPPER", "per%cent %s %I", "back\\slash", "x" * 63, "ü" * 31)


@pytest.mark.parametrize("mode", ["deferred", "immediate"])
def test_names_that_need_quoting(warm: Connection, mode: str) -> None:
    """Schema, table, key, source and target all of the same awkward name."""
    for name in AWKWARD:
        schema, table = sql.Identifier(name), sql.Identifier(name, name)
        source, key, target = (sql.Identifier(name[:60] + suffix) for suffix in ("s", "k", "t"))
        warm.execute(sql.SQL("create schema {}").format(schema))
        try:
            warm.execute(
                sql.SQL("create table {} ({} text primary key, {} text, {} vector(32))").format(
                    table, key, source, target
                )
            )
            warm.execute(
                sql.SQL("select embed_column({}, {}::name, {}::name, 'tiny-mpnet', {})").format(
                    table.as_string(warm), name[:60] + "s", name[:60] + "t", mode
                )
            )
            warm.execute(sql.SQL("insert into {} values ({}, 'a text')").format(table, name))
            assert fill(warm) == (mode == "deferred")
            search = "select key from embed_search(%s::regclass, 'a text', target => %s)"
            assert scalar(warm, search, [table.as_string(warm), name[:60] + "t"]) == {name[:60] + "k": name}
            warm.execute(sql.SQL("update {} set {} = ' '").format(table, source))
            assert warm.execute(sql.SQL("select {} from {}").format(target, table)).fetchone() == (None,)
            call = sql.SQL("select embed_column_drop({}, {})").format(table.as_string(warm), name[:60] + "t")
            warm.execute(call)
            assert (
                scalar(warm, "select count(*) from pg_trigger where tgrelid = %s::regclass", [table.as_string(warm)])
                == 0
            )
        finally:
            warm.execute(sql.SQL("drop schema {} cascade").format(schema))


def test_extensions_in_schemas_of_their_own(connect: Callable[..., Connection], db: Connection, tiny: str) -> None:
    for statement in (
        "drop extension pg_autoembed cascade",
        "drop extension vector",
        'create schema "the vectors"',
        'create schema "the interface"',
        'create extension vector schema "the vectors"',
        'create extension pg_autoembed schema "the interface"',
        "create schema data",
        'create table data.docs (id int primary key, content text, embedding "the vectors".vector(32))',
        "insert into data.docs values (1, 'a text')",
        "set search_path = ''",
        "select \"the interface\".embed_column('data.docs', 'content', model => 'tiny-mpnet', mode => 'immediate')",
        "insert into data.docs values (2, 'another text')",
    ):
        db.execute(statement)
    assert column(db, "select id from data.docs where embedding is not null") == [2]
    assert db.execute('call "the interface".embed_pending()').fetchone() == (1, 0, 0, 0)
    found = "select key from \"the interface\".embed_search('data.docs', 'a text', 1)"
    assert scalar(db, found) == {"id": 1}
    assert '"the vectors".vector_cosine_ops' in scalar(db, "select \"the interface\".embed_index('data.docs')")
    db.execute("update data.docs set content = ' ' where id = 1")
    assert column(db, "select id from data.docs where embedding is null") == [1]
    assert scalar(db, 'select total from "the interface".embedding_progress') == 2


def test_partitioned_table(warm: Connection) -> None:
    warm.execute(
        "create table docs (id int, part int, content text, embedding vector(32), primary key (id, part)) "
        "partition by list (part)"
    )
    warm.execute("create table docs1 partition of docs for values in (1)")
    warm.execute(
        "create table docs2 (part int not null, embedding vector(32), gone int, content text, id int not null)"
    )
    warm.execute("alter table docs2 drop column gone")
    warm.execute("alter table docs attach partition docs2 for values in (2)")
    warm.execute(DECLARE)
    warm.execute("create table docs3 partition of docs for values in (3)")
    warm.execute(
        "insert into docs select n, p, format('text %s of %s', n, p) "
        "from generate_series(1, 4) n, generate_series(1, 3) p"
    )
    assert fill(warm) == 12
    warm.execute("update docs set content = 'another' where id = 1")
    warm.execute("update docs3 set content = 'another' where id = 2")
    assert scalar(warm, "select count(*) from docs where embedding is null") == 4
    assert fill(warm) == 4
    assert scalar(warm, "select key->>'part' from embed_search('docs', 'text 4 of 3', 1)") == "3"


def test_table_with_dropped_columns(warm: Connection) -> None:
    warm.execute(
        "create table docs (a int, id int primary key, b text, content text, c int, embedding vector(32), d int)"
    )
    for gone in "abcd":
        warm.execute(f"alter table docs drop column {gone}")
    warm.execute("alter table docs add column late text default 'late'")
    warm.execute(DECLARE)
    warm.execute("insert into docs values (1, 'a text')")
    assert fill(warm) == 1
    warm.execute("update docs set content = 'another'")
    assert warm.execute("select * from docs").fetchall() == [(1, "another", None, "late")]


@pytest.mark.parametrize("kind", ["varchar(99)", "char(99)", "citext", "words"])
def test_types_of_text(warm: Connection, kind: str) -> None:
    if kind == "citext":
        warm.execute("create extension citext")
    warm.execute("create domain words as varchar(99) check (value <> 'bad')")
    warm.execute(f"create table docs (id int primary key, content {kind}, embedding vector(32))")
    warm.execute(DECLARE)
    warm.execute("insert into docs values (1, 'a text')")
    assert fill(warm) == 1
    assert scalar(warm, "update docs set content = 'A TEXT' returning embedding is null")


def test_unlogged_table_and_child_of_a_parent(warm: Connection) -> None:
    warm.execute("create unlogged table docs (id int primary key, content text, embedding vector(32))")
    warm.execute("create table parent (id int, content text, embedding vector(32))")
    warm.execute("create table child (primary key (id)) inherits (parent)")
    warm.execute(DECLARE)
    warm.execute("select embed_column('child', 'content', model => 'tiny-mpnet')")
    warm.execute("insert into child values (1, 'a text')")
    assert fill(warm) == 1


# --- again, changed, dropped ---------------------------------------------------------------------------------------


def test_declared_twice(warm: Connection) -> None:
    warm.execute(DOCS)
    warm.execute(DECLARE)
    error = refusal(warm, DECLARE)
    assert (error.sqlstate, said(warm, error.diag.message_primary)) == (
        "42710",
        "column embedding of docs is declared already",
    )
    assert error.diag.message_hint == (
        "Change it with embed_column_set, drop it with embed_column_drop, or pass if_not_exists => true."
    )
    with notices(warm) as heard:
        warm.execute("select embed_column('docs', 'content', model => 'tiny-mpnet', if_not_exists => true)")
    assert [said(warm, n.message) for n in heard] == ["column embedding of docs is declared already, nothing changed"]
    assert len(declared(warm)) == 1


def test_declaring_again_with_other_sources_says_that_they_stay(warm: Connection) -> None:
    warm.execute(DOCS)
    warm.execute(DECLARE)
    with notices(warm) as heard:
        warm.execute(
            "select embed_column('docs', array['note', 'content'], model => 'tiny-mpnet', if_not_exists => true)"
        )
    assert (heard[0].severity, said(warm, heard[0].message)) == (
        "WARNING",
        "column embedding of docs stays declared for other source columns: content",
    )
    assert declared(warm)[0][1] == ["content"]


@pytest.mark.parametrize(
    "statement",
    [
        "select embed_search('docs', 'a question')",
        "select embed_index('docs')",
        "call embed_wait('docs', '0')",
        "call embed_pending(32, 'docs')",
    ],
)
def test_without_its_key_a_relation_is_refused_in_words(warm: Connection, statement: str) -> None:
    warm.execute(DOCS)
    warm.execute(DECLARE)
    warm.execute("insert into docs values (1, 'a text')")
    warm.execute("alter table docs drop constraint docs_pkey")
    error = refusal(warm, statement)
    assert (error.sqlstate, said(warm, error.diag.message_primary)) == (
        "55000",
        "relation docs has lost its primary key: its rows cannot be told apart",
    )
    assert "Add a primary key" in str(error.diag.message_hint)


def test_a_target_of_another_name_is_named_in_the_hint(warm: Connection) -> None:
    warm.execute('create table docs (id bigint primary key, content text, "The Vec" vector(32))')
    warm.execute("select embed_column('docs', 'content', 'The Vec', model => 'tiny-mpnet')")
    error = refusal(warm, "select embed_search('docs', 'a question')")
    assert error.diag.message_hint == 'Declared there: "The Vec". Name it with target => ....'


def test_declaring_again_mends_a_lost_index(warm: Connection) -> None:
    warm.execute(DOCS)
    warm.execute(DECLARE)
    warm.execute("drop index docs_embedding_pending")
    assert declared(warm)[0][-1] == "no pending index: call embed_column with if_not_exists => true"
    with notices(warm) as heard:
        warm.execute("select embed_column('docs', 'content', model => 'tiny-mpnet', if_not_exists => true)")
    assert str(heard[0].message).endswith("is declared already, its pending index was made anew")
    assert declared(warm)[0][-1] == "ready"


def test_paused_column_is_left_alone(warm: Connection) -> None:
    warm.execute(DOCS)
    warm.execute(DECLARE)
    warm.execute("insert into docs values (1, 'a text')")
    warm.execute("select embed_column_set('docs', 'embedding', enabled => false)")
    assert declared(warm)[0][5] is False
    assert declared(warm)[0][-1] == "paused"
    assert fill(warm) == 0
    warm.execute("select embed_column_set('docs', 'embedding', enabled => true)")
    assert fill(warm) == 1


def test_another_model_clears_the_column(warm: Connection, fragile: Path) -> None:
    warm.execute("create table docs (id int primary key, content text, embedding vector(32))")
    warm.execute("select embed_column('docs', 'content', model => %s)", [fragile.name])
    warm.execute("insert into docs values (1, 'a text'), (2, 'a text')")
    assert fill(warm) == 2
    with notices(warm) as heard:
        warm.execute("select embed_column_set('docs', 'embedding', model => 'tiny-mpnet')")
    assert [said(warm, n.message) for n in heard] == [
        "docs.embedding: 2 vectors of the former model cleared, to be computed again"
    ]
    assert column(warm, "select embedding from docs") == [None, None]
    assert declared(warm)[0][3] == TINY
    warm.execute(f"insert into docs values (3, 'a text', {VECTOR})", [1])
    with notices(warm) as heard:
        warm.execute("select embed_column_set('docs', 'embedding', model => %s)", [fragile.name])
    assert ": 1 vector of the former model cleared" in str(heard[0].message)


def test_same_model_again_keeps_the_vectors(warm: Connection) -> None:
    warm.execute(DOCS)
    warm.execute(f"insert into docs values (1, 'one', null, {VECTOR})", [1])
    warm.execute(DECLARE)
    warm.execute("select embed_column_set('docs', 'embedding', model => 'tiny-mpnet', mode => 'immediate')")
    assert declared(warm)[0][4] == "immediate"
    assert scalar(warm, "select embedding is not null from docs")


def test_change_is_refused_with_reasons(warm: Connection) -> None:
    warm.execute(DOCS)
    error = refusal(warm, "select embed_column_set('docs', 'embedding', mode => 'immediate')")
    assert (error.sqlstate, said(warm, error.diag.message_primary)) == (
        "42704",
        "column embedding of relation docs is not declared for embedding",
    )
    assert error.diag.message_hint is not None
    warm.execute(DECLARE)
    error = refusal(warm, "select embed_column_set('docs', 'embedding', mode => 'sometimes')")
    assert (error.sqlstate, error.diag.message_hint) == ("22023", "The modes are deferred and immediate.")


def test_a_model_of_other_dimensions_changes_the_columns_type(warm: Connection) -> None:
    warm.execute(DOCS)
    warm.execute(DECLARE)
    warm.execute("insert into docs values (1, 'one', null)")
    assert fill(warm) == 1
    warm.execute("select embed_column_set('docs', 'embedding', model => 'all-MiniLM-L6-v2')")
    assert column(warm, "select status from embedding_columns where relation = 'docs'::regclass") == ["ready"]
    kind = "select format_type(atttypid, atttypmod) from pg_attribute where attrelid = 'docs'::regclass"
    assert scalar(warm, f"{kind} and attname = 'embedding'").endswith("vector(384)")
    assert column(warm, "select embedding from docs") == [None]
    assert fill(warm) == 1
    assert scalar(warm, "select vector_dims(embedding) from docs") == 384


@pytest.mark.parametrize("option", ["cache => true", "track => true"])
def test_options_that_are_not_served_yet(warm: Connection, option: str) -> None:
    warm.execute(DOCS)
    declaring = f"select embed_column('docs', 'content', model => 'tiny-mpnet', {option})"
    assert refusal(warm, declaring).sqlstate == "0A000"
    warm.execute(DECLARE)
    changing = f"select embed_column_set('docs', 'embedding', {option})"
    assert refusal(warm, changing).sqlstate == "0A000"
    aside = "select embed_column('docs', 'content', model => 'tiny-mpnet', destination => 'aside')"
    assert refusal(warm, aside).sqlstate == "0A000"
    assert refusal(warm, "select embed_column_set('docs', 'embedding', writes => 'nobody')").sqlstate == "22023"


@pytest.mark.parametrize("mode", ["deferred", "immediate"])
def test_dropping_keeps_vectors_and_nothing_else(warm: Connection, mode: str) -> None:
    warm.execute(DOCS)
    before = objects_of(warm)
    warm.execute("select embed_column('docs', 'content', model => 'tiny-mpnet', mode => %s)", [mode])
    warm.execute("insert into docs values (1, 'a text')")
    fill(warm)
    assert objects_of(warm) != before
    warm.execute("select embed_column_drop('docs')")
    assert objects_of(warm) == before
    assert declared(warm) == []
    assert scalar(warm, "select count(*) from autoembed.run") == 0
    warm.execute("update docs set content = 'another'")
    assert scalar(warm, "select embedding is not null from docs")
    error = refusal(warm, "select embed_column_drop('docs')")
    assert error.sqlstate == "42704"


def objects_of(connection: Connection) -> list[tuple[Any, ...]]:
    return connection.execute(
        "select 'trigger', tgname::text from pg_trigger where tgrelid = 'docs'::regclass "
        "union all select 'index', indexrelid::regclass::text from pg_index where indrelid = 'docs'::regclass "
        "order by 1, 2"
    ).fetchall()


def test_dropping_one_target_leaves_the_other(warm: Connection) -> None:
    warm.execute("create table docs (id int primary key, content text, a vector(32), b vector(32))")
    warm.execute("select embed_column('docs', 'content', 'a', 'tiny-mpnet', 'immediate')")
    warm.execute("select embed_column('docs', 'content', 'b', 'tiny-mpnet', 'immediate')")
    warm.execute("select embed_column_drop('docs', 'a')")
    warm.execute("insert into docs values (1, 'a text')")
    assert warm.execute("select a is null, b is null from docs").fetchone() == (True, False)
    assert warm.execute("update docs set content = ' ' returning b").fetchone() == (None,)


# --- refused -------------------------------------------------------------------------------------------------------

TABLE = "create table docs (id int primary key, content text, embedding {})"
FITTING = TABLE.format("vector(32)")
KEYLESS = "create table docs (id int, content text, embedding vector(32))"
UNSUITABLE = "docs cannot have an embedding column: "

REFUSALS: dict[str, tuple[str, str, str, str]] = {
    "wrong dimension": (
        TABLE.format("vector(3)"),
        "42804",
        "target column embedding of docs is vector(3), but model tiny-mpnet has 32 dimensions",
        "alter table docs alter column embedding type vector(32), or name a model that fits.",
    ),
    "no dimension": (
        TABLE.format("vector"),
        "42804",
        "target column embedding of docs is a vector without dimensions, but model tiny-mpnet has 32 dimensions",
        "alter table docs alter column embedding type vector(32), or name a model that fits.",
    ),
    "wrong type": (
        TABLE.format("real[]"),
        "42804",
        "target column embedding of docs is of type real[], not vector",
        "Use a column of type vector(32).",
    ),
    "half vector": (
        TABLE.format("halfvec(32)"),
        "42804",
        "target column embedding of docs is of type halfvec(32), not vector",
        "Use a column of type vector(32).",
    ),
    "another type of that name": (
        "create domain vector as text; " + TABLE.format("s_.vector"),
        "42804",
        "target column embedding of docs is of type vector, not vector",
        "Use a column of type vector(32).",
    ),
    "no target": (
        "create table docs (id int primary key, content text)",
        "42703",
        "relation docs has no column embedding",
        "Add it: alter table docs add column embedding vector(32)",
    ),
    "dropped target": (
        FITTING + "; alter table docs drop column embedding",
        "42703",
        "relation docs has no column embedding",
        "Add it: alter table docs add column embedding vector(32)",
    ),
    "not null target": (
        TABLE.format("vector(32) not null"),
        "55000",
        UNSUITABLE + "target column embedding is NOT NULL",
        "A row waits for its vector with a null there: alter table docs alter column embedding drop not null",
    ),
    "generated target": (
        TABLE.format("vector(32) generated always as (null::vector(32)) stored"),
        "55000",
        UNSUITABLE + "target column embedding is generated",
        "Use a plain column.",
    ),
    "no source": (
        "create table docs (id int primary key, embedding vector(32))",
        "42703",
        "relation docs has no column content",
        "Name the column, or an array of columns, that holds the text.",
    ),
    "generated source": (
        "create table docs (id int primary key, a text, content text generated always as (lower(a)) stored, "
        "embedding vector(32))",
        "55000",
        UNSUITABLE + "source column content is generated",
        "Name the columns that it is generated from: triggers cannot see a generated column change.",
    ),
    "source not text": (
        "create table docs (id int primary key, content jsonb, embedding vector(32))",
        "42804",
        "source column content of docs is of type jsonb",
        TEXT_TYPES,
    ),
    "source an enum": (
        "create type mood as enum ('a'); create table docs (id int primary key, content mood, embedding vector(32))",
        "42804",
        "source column content of docs is of type mood",
        TEXT_TYPES,
    ),
    "no key": (KEYLESS, "55000", UNSUITABLE + "it has neither a primary key nor a unique key without nulls", NO_KEY),
    "key with nulls": (
        KEYLESS + "; create unique index on docs (id)",
        "55000",
        UNSUITABLE + "it has neither a primary key nor a unique key without nulls",
        NO_KEY,
    ),
    "partial key": (
        KEYLESS + "; alter table docs alter id set not null; create unique index on docs (id) where id > 0",
        "55000",
        UNSUITABLE + "it has neither a primary key nor a unique key without nulls",
        NO_KEY,
    ),
    "key of an expression": (
        KEYLESS + "; create unique index on docs (abs(id))",
        "55000",
        UNSUITABLE + "it has neither a primary key nor a unique key without nulls",
        NO_KEY,
    ),
    "key in another order than its type's": (
        KEYLESS + "; alter table docs alter content set not null;"
        "create unique index on docs (content text_pattern_ops)",
        "55000",
        UNSUITABLE + "it has neither a primary key nor a unique key without nulls",
        NO_KEY,
    ),
    "deferrable key": (
        KEYLESS + "; alter table docs add primary key (id) deferrable",
        "55000",
        UNSUITABLE + "its key is deferrable: for a while two rows may have the same",
        "Add one that is not: alter table docs add unique (id)",
    ),
    "view": (
        "create view docs as select 1 as id, ''::text as content, null::vector(32) as embedding",
        "55000",
        UNSUITABLE + "it is a view",
        "Declare the table beneath it.",
    ),
    "materialized view": (
        "create materialized view docs as select 1 as id, ''::text as content, null::vector(32) as embedding",
        "55000",
        UNSUITABLE + "it is a view",
        "Declare the table beneath it.",
    ),
    "foreign table": (
        "create foreign data wrapper nothing; create server nowhere foreign data wrapper nothing; "
        "create foreign table docs (id int, content text, embedding vector(32)) server nowhere",
        "55000",
        UNSUITABLE + "it is a foreign table",
        "Declare the table where it is stored.",
    ),
    "inheritance parent": (
        FITTING + "; create table child () inherits (docs)",
        "55000",
        UNSUITABLE + "other tables inherit from it",
        "Declare each of them, or use partitioning.",
    ),
    "partition": (
        "create table parent (id int primary key, content text, embedding vector(32)) partition by list (id); "
        "create table docs partition of parent default",
        "55000",
        UNSUITABLE + "it is a partition",
        "Declare the partitioned table.",
    ),
    "temporary table": (
        FITTING.replace("create table", "create temp table"),
        "55000",
        UNSUITABLE + "it is a temporary table",
        "Use embed() for texts of one session.",
    ),
    "sequence": ("create sequence docs", "55000", UNSUITABLE + "it is not a table", "Name a table."),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused(warm: Connection, case: str) -> None:
    statements, state, message, hint = REFUSALS[case]
    try:
        for statement in statements.replace("s_.", f"{scalar(warm, 'select current_schema()')}.").split("; "):
            warm.execute(statement)
        error = refusal(warm, DECLARE)
        assert (error.sqlstate, said(warm, error.diag.message_hint)) == (state, hint)
        assert said(warm, error.diag.message_primary) == message
        assert declared(warm) == []
    finally:
        for leftover in ("table if exists pg_temp.docs", "foreign data wrapper if exists nothing cascade"):
            warm.execute(f"drop {leftover}")


ARGUMENTS: dict[str, tuple[str, str, str | None, str | None]] = {
    "unknown mode": ("'docs', 'content', mode => 'later'", "22023", "mode 'later' is unknown", MODES),
    "null mode": ("'docs', 'content', mode => null", "22023", "mode NULL is unknown", MODES),
    "empty array": ("'docs', array[]::name[]", "22004", None, None),
    "null relation": ("null, 'content'", "22004", None, None),
    "null source": ("'docs', null::name", "22004", None, None),
    "null in the array": ("'docs', array['content', null]", "22004", None, None),
    "null target": ("'docs', 'content', null", "22004", None, None),
    "unknown model": ("'docs', 'content', model => 'missing'", "22023", None, ""),
    "a path": ("'docs', 'content', model => '../tiny-mpnet'", "22023", '"../tiny-mpnet" is not a model\'s name', ""),
    "an absolute path": ("'docs', 'content', model => '/etc'", "22023", '"/etc" is not a model\'s name', ""),
    "the system's table": ("'pg_description', 'description'", "55000", None, "Name a table of your own."),
    "the product's table": ("'autoembed.failure', 'message'", "55000", None, "Name a table of your own."),
    "a system column": ("'docs', 'content', 'ctid'", "42703", "relation docs has no column ctid", ""),
    "missing relation": ("'nowhere', 'content'", "42P01", None, None),
    "source and target the same": ("'docs', 'embedding', 'embedding'", "42804", None, None),
    "the same source twice": ("'docs', array['content', 'content'], model => 'tiny-mpnet'", "42701", None, ""),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_argument_refused(warm: Connection, case: str) -> None:
    arguments, state, message, hint = ARGUMENTS[case]
    warm.execute(FITTING)
    error = refusal(warm, f"select embed_column({arguments})")
    assert error.sqlstate == state
    if message is not None:
        assert said(warm, error.diag.message_primary) == message
    if hint is not None:
        assert error.diag.message_hint == hint or (hint == "" and error.diag.message_hint)


def test_unknown_model_lists_the_known_ones(warm: Connection) -> None:
    warm.execute(FITTING)
    hint = refusal(warm, "select embed_column('docs', 'content', model => 'missing')").diag.message_hint
    assert hint is not None
    assert TINY in hint
    assert "model add" in hint


def test_only_the_owner_declares(warm: Connection, warm_role: Callable[..., str]) -> None:
    alice, bob = warm_role("alice"), warm_role("bob")
    warm.execute("grant execute on all functions in schema public to alice, bob")
    with acting_as(warm, alice):
        warm.execute(DOCS)
        warm.execute(DECLARE)
        warm.execute("grant all on docs to bob")
        warm.execute("create table more (id int primary key, content text, embedding vector(32))")
        warm.execute("grant all on more to bob")
    with acting_as(warm, bob):
        for call in (
            "embed_column('more', 'content', model => 'tiny-mpnet')",
            "embed_column_set('docs', 'embedding', mode => 'immediate')",
            "embed_column_drop('docs')",
        ):
            assert refusal(warm, f"select {call}").sqlstate == "42501"
    assert [row[:1] + row[4:6] for row in declared(warm)] == [("docs", "deferred", True)]


def test_failed_declaration_leaves_nothing(warm: Connection) -> None:
    warm.execute(DOCS)
    warm.execute("begin")
    warm.execute(DECLARE)
    warm.execute("rollback")
    assert declared(warm) == []
    assert [row for row in objects_of(warm) if row[0] == "trigger"] == []


STRANGERS = {
    "function": "create function home.format(text, text) returns text language sql return $1",
    "operator": "create operator home.|| (function = pg_catalog.textcat, leftarg = text, rightarg = text)",
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_is_not_installed_among_a_strangers_functions(db: Connection, kind: str) -> None:
    """They could match a call of the script better than PostgreSQL's own, and would run as superuser."""
    db.execute("drop extension pg_autoembed cascade")
    db.execute("create role stranger")
    try:
        db.execute("create schema home authorization stranger")
        with acting_as(db, "stranger"):
            db.execute(STRANGERS[kind].encode())
            db.execute("create function home.harmless(text) returns text language sql return $1")
        error = refusal(db, "create extension pg_autoembed schema home")
        assert error.sqlstate == "55000"
        assert "schema home holds " in str(error.diag.message_primary)
        db.execute(b"drop function home.format" if kind == "function" else b"drop operator home.|| (text, text)")
        db.execute("create extension pg_autoembed schema home")
    finally:
        db.execute("drop schema home cascade")
        db.execute("drop role stranger")
