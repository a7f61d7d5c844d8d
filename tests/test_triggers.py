"""Triggers: a row never carries another text's vector, and writes never fail because a model did."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from support.server import Connection
from support.talk import TINY, VECTOR, acting_as, column, notices, refusal, scalar

pytest_plugins = ["support.warm"]

DOCS = "create table docs (id int primary key, content text, note text, embedding vector(32))"
PARTED = f"{DOCS} partition by range (id)"
DECLARE = "select embed_column('docs', 'content', model => 'tiny-mpnet', mode => %s)"
CHANGER = """
create function change_text() returns trigger language plpgsql as $$
begin
    new.content := new.content || ' and ' || new.note;
    return new;
end
$$"""
CASELESS = "create collation caseless (provider = icu, locale = 'und-u-ks-level2', deterministic = false)"


@pytest.fixture
def docs(warm: Connection) -> Connection:
    """A deferred column with two filled rows (vectors of ones) and a pending one."""
    warm.execute(DOCS)
    warm.execute(DECLARE, ["deferred"])
    refill(warm)
    return warm


@pytest.fixture
def live(warm: Connection) -> Connection:
    """An empty table with an immediate column."""
    warm.execute(DOCS)
    warm.execute(DECLARE, ["immediate"])
    return warm


def refill(connection: Connection) -> None:
    connection.execute("truncate docs")
    ones = f"(1, 'one', 'n', {VECTOR}), (2, 'two', 'n', {VECTOR}), (3, 'three', 'n', null)"
    connection.execute(f"insert into docs values {ones}", [1, 1])


def vectors(connection: Connection, relation: str = "docs") -> list[float | None]:
    """Each row's vector by its first dimension, in key order."""
    return column(connection, f"select (embedding::real[])[1] from {relation} order by id")


def is_near(distance: float | None) -> bool:
    return distance is not None and distance < 1e-5


ANYONE_WRITES = "select embed_column_set('docs', 'embedding', writes => 'anyone')"


def distance(connection: Connection, relation: str = "docs") -> list[float | None]:
    """How far each row's vector is from that of its text."""
    statement = f"select embedding <-> embed(content, 'tiny-mpnet', 'document') from {relation} order by id"
    return column(connection, statement)


# --- deferred ------------------------------------------------------------------------------------------------------


def test_insert_runs_no_trigger_in_deferred_mode(docs: Connection) -> None:
    on_insert = "select count(*) from pg_trigger where tgrelid = 'docs'::regclass and tgtype & 4 = 4"
    assert scalar(docs, on_insert) == 0
    assert vectors(docs) == [1, 1, None]


@pytest.mark.parametrize(
    ("change", "after"),
    [
        ("set content = 'new' where id = 1", [None, 1, None]),
        ("set content = upper(content)", [None, None, None]),
        ("set content = null where id = 1", [None, 1, None]),
        ("set content = content, note = 'other'", [1, 1, None]),
        ("set note = 'other'", [1, 1, None]),
        (f"set embedding = {VECTOR.replace('%s', '2')} where id = 1", [1, 1, None]),
        (f"set embedding = {VECTOR.replace('%s', '2')}", [1, 1, None]),
        ("set embedding = null where id = 1", [None, 1, None]),
        (f"set content = 'new', embedding = {VECTOR.replace('%s', '2')} where id = 1", [None, 1, None]),
        (f"set content = 'new', embedding = {VECTOR.replace('%s', '1')} where id = 1", [None, 1, None]),
        ("set id = id + 10, content = content, note = note, embedding = embedding", [1, 1, None]),
        ("set id = id, content = content || '!', note = note, embedding = embedding", [None, None, None]),
        ("set content = d.content from docs d where d.id = docs.id % 2 + 1", [None, None, None]),
    ],
)
def test_update(docs: Connection, change: str, after: list[float | None]) -> None:
    docs.execute(f"update docs {change}")
    assert vectors(docs) == after


@pytest.mark.parametrize(
    ("change", "after"),
    [
        (f"set embedding = {VECTOR.replace('%s', '2')} where id = 1", [2, 1, None]),
        (f"set content = 'new', embedding = {VECTOR.replace('%s', '2')} where id = 1", [2, 1, None]),
        (f"set content = 'new', embedding = {VECTOR.replace('%s', '1')} where id = 1", [None, 1, None]),
        ("set content = 'new' where id = 1", [None, 1, None]),
        ("set note = 'other'", [1, 1, None]),
    ],
)
def test_update_where_anyone_writes_vectors(docs: Connection, change: str, after: list[float | None]) -> None:
    docs.execute(ANYONE_WRITES)
    docs.execute(f"update docs {change}")
    assert vectors(docs) == after


def test_a_save_of_the_whole_row_brings_no_old_vector_back(docs: Connection) -> None:
    """As object mappers save: the first save clears the vector, the second would write the remembered one back."""
    save = f"update docs set note = %s, content = 'changed', embedding = {VECTOR} where id = 1"
    with notices(docs) as said:
        docs.execute(save, ["a", 1])
        docs.execute(save, ["b", 1])
    assert vectors(docs) == [None, 1, None]
    assert len(said) == 1
    assert "does not set column embedding: its vectors come from the fill alone" in str(said[0].message)
    assert str(said[0].hint).endswith("docs', 'embedding', writes => 'anyone')")
    docs.execute("call embed_pending()")
    assert is_near(distance(docs)[0])
    docs.execute(save, ["c", 1])
    assert is_near(distance(docs)[0])


def test_a_vector_that_is_not_taken_needs_no_json_of_the_row(warm: Connection) -> None:
    warm.execute("create table docs (id int primary key, content text, embedding vector(32), meta json)")
    warm.execute(DECLARE, ["deferred"])
    row = f"insert into docs values (1, 'one', {VECTOR}, %s)"
    warm.execute(row, [1, r'{"k": "\u0000", "n": 1e200000}'])
    warm.execute(f"update docs set embedding = {VECTOR}", [2])
    assert vectors(warm) == [1]


def test_the_fill_is_told_nothing_about_its_own_vectors(warm: Connection) -> None:
    warm.execute(DOCS)
    warm.execute(
        "create function shout() returns trigger language plpgsql as $$ begin new.content := upper(new.content);"
        " return new; end $$; create trigger shout before update on docs for each row execute function shout()"
    )
    warm.execute(DECLARE, ["deferred"])
    warm.execute("insert into docs values (1, 'one')")
    with notices(warm) as heard:
        warm.execute("call embed_pending()")
    assert [n.message for n in heard if "come from the fill" in str(n.message)] == []
    assert is_near(distance(warm)[0])


def test_replication_brings_vectors(docs: Connection) -> None:
    docs.execute("set session_replication_role = replica")
    docs.execute(f"update docs set embedding = {VECTOR} where id = 2", [3])
    docs.execute(f"update docs set content = 'new', embedding = {VECTOR} where id = 1", [3])
    docs.execute("reset session_replication_role")
    assert vectors(docs) == [3, 3, None]


def test_the_fill_is_no_way_in_for_the_rest_of_its_transaction(live: Connection) -> None:
    """Immediate mode writes inside the writer's own transaction."""
    with live.transaction():
        live.execute("insert into docs (id, content) values (1, 'one')")
        live.execute(f"update docs set embedding = {VECTOR}", [7])
    assert all(map(is_near, distance(live)))


def test_text_that_comes_to_a_filled_row_without_one(docs: Connection) -> None:
    docs.execute("update docs set content = null")
    docs.execute(f"update docs set embedding = {VECTOR}", [3])
    docs.execute("update docs set content = 'text'")
    assert vectors(docs) == [None, None, None]


def test_bulk_update(docs: Connection) -> None:
    docs.execute(f"insert into docs select n, 'text', 'n', {VECTOR} from generate_series(4, 3000) n", [1])
    docs.execute("update docs set content = 'text ' || id where id > 1000")
    assert scalar(docs, "select count(embedding) from docs where id > 1000") == 0
    assert scalar(docs, "select count(embedding) from docs where id <= 1000") == 999


def test_copy(docs: Connection) -> None:
    vector = "[" + ",".join(["7"] * 32) + "]"
    with docs.cursor().copy("copy docs (id, content, embedding) from stdin") as copy:
        copy.write_row((4, "four", None))
        copy.write_row((5, "five", vector))
    assert vectors(docs) == [1, 1, None, None, 7]


def test_on_conflict(docs: Connection) -> None:
    upsert = "insert into docs values {} on conflict (id) do update set content = excluded.content"
    docs.execute(upsert.format("(1, 'one'), (2, 'changed'), (4, 'four')"))
    assert vectors(docs) == [1, None, None, None]
    new = VECTOR.replace("%s", "5")
    docs.execute(upsert.format(f"(1, 'changed', 'n', {new})") + ", embedding = excluded.embedding")
    assert vectors(docs) == [None, None, None, None]
    docs.execute(ANYONE_WRITES)
    docs.execute(upsert.format(f"(1, 'changed again', 'n', {new})") + ", embedding = excluded.embedding")
    assert vectors(docs) == [5, None, None, None]


def test_merge(docs: Connection) -> None:
    if docs.info.server_version < 150000:
        pytest.skip("MERGE came with PostgreSQL 15")
    docs.execute(
        "merge into docs d using (values (1, 'one'), (2, 'changed'), (4, 'four')) s (id, content) on d.id = s.id "
        "when matched then update set content = s.content "
        "when not matched then insert (id, content) values (s.id, s.content)"
    )
    assert vectors(docs) == [1, None, None, None]


def test_view_rule_and_foreign_key_write_too(warm: Connection) -> None:
    warm.execute("create table words (word text primary key)")
    warm.execute("insert into words values ('old')")
    warm.execute(
        "create table docs (id int primary key, content text references words on update cascade, note text, "
        "embedding vector(32))"
    )
    warm.execute(DECLARE, ["deferred"])
    warm.execute(f"insert into docs values (1, 'old', null, {VECTOR})", [1])
    warm.execute("update words set word = 'new'")
    assert warm.execute("select content, embedding from docs").fetchall() == [("new", None)]
    warm.execute(ANYONE_WRITES)
    warm.execute(f"update docs set embedding = {VECTOR}", [1])
    warm.execute("insert into words values ('newer')")
    warm.execute("create view through as select id, content from docs")
    warm.execute("update through set content = 'newer'")
    assert vectors(warm) == [None]


def test_two_sources_and_two_targets(warm: Connection) -> None:
    warm.execute("create table docs (id int primary key, a text, b text, embedding vector(32), other vector(32))")
    warm.execute("select embed_column('docs', array['a', 'b'], model => 'tiny-mpnet')")
    warm.execute("select embed_column('docs', 'b', 'other', model => 'tiny-mpnet')")
    fill = f"insert into docs values (1, 'a', 'b', {VECTOR}, {VECTOR}) on conflict (id) do update "
    fill += "set a = 'a', b = 'b', embedding = excluded.embedding, other = excluded.other"
    state = "update docs set {} returning embedding is null, other is null"
    for change, cleared in (("a = 'x'", (True, False)), ("b = 'x'", (True, True)), ("b = null", (True, True))):
        warm.execute("delete from docs")
        warm.execute(fill, [1, 1])
        assert warm.execute(state.format(change)).fetchone() == cleared


def test_other_columns_come_through_unchanged(warm: Connection) -> None:
    """Clearing the vector rebuilds the row: nothing else in it may change, whatever its type."""
    for statement in (
        "create domain filled as text not null check (value <> '')",
        "create type pair as (a int, b text)",
        "create table docs (gone int, id int primary key, content text, embedding vector(32), f double precision, "
        "n numeric, p pair, ps pair[], j json, jb jsonb, x xml, b bytea, m timestamptz, i interval, d filled, "
        'r int4range, doubled text generated always as (content || content) stored, me uuid, tag "char", '
        "bits varbit, ms int4multirange)",
        "alter table docs drop column gone",
    ):
        warm.execute(statement)
    warm.execute(DECLARE, ["deferred"])
    warm.execute(
        f"insert into docs values (1, 'one', {VECTOR}, 'nan', 1.500, (1, null), array[(2, 'x')::pair, null], "
        "'{\"b\": 1,  \"b\": 2}', '{\"a\": null}', '<a/>', '\\x00ff', '2020-01-01 00:00:00.000001+00', "
        "'1 mon -3 days', 'd', '[1,5)', default, gen_random_uuid(), '\\', b'0110', '{[1,2)}')",
        [1],
    )
    others = "select (to_jsonb(w) - 'content' - 'embedding' - 'doubled')::text || j::text || x::text from docs w"
    before = scalar(warm, others)
    warm.execute("set datestyle = 'German'; set intervalstyle = 'iso_8601'; set bytea_output = 'escape'")
    warm.execute("set extra_float_digits = -15")
    warm.execute("update docs set content = 'two'")
    for setting in ("datestyle", "intervalstyle", "bytea_output", "extra_float_digits"):
        warm.execute(f"reset {setting}")
    assert scalar(warm, others) == before
    assert warm.execute("select doubled, embedding from docs").fetchone() == ("twotwo", None)


# --- the user's own triggers ---------------------------------------------------------------------------------------

TRIGGER = 'create trigger "{}" before update on {} for each row execute function change_text()'


@pytest.mark.parametrize("name", ["a_first", "zz_last", "~~~last", "ändern", "\U0010ffff"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_users_trigger_changes_the_text(warm: Connection, name: str, when: str) -> None:
    """Whatever it is called, and whether it was there first or came later."""
    warm.execute(DOCS)
    warm.execute(CHANGER)
    if when == "before":
        warm.execute(TRIGGER.format(name, "docs"))
    warm.execute(DECLARE, ["deferred"])
    if when == "after":
        warm.execute(TRIGGER.format(name, "docs"))
    refill(warm)
    warm.execute("update docs set note = 'other' where id = 1")
    assert warm.execute("select content, embedding from docs where id = 1").fetchone() == ("one and other", None)


def test_users_trigger_is_renamed_behind_ours(docs: Connection) -> None:
    docs.execute(CHANGER)
    docs.execute(TRIGGER.format("a", "docs"))
    docs.execute('alter trigger "a" on docs rename to "~zz"')
    docs.execute("update docs set note = 'other' where id = 1")
    assert vectors(docs) == [None, 1, None]


@pytest.mark.parametrize("name", ["a_first", "~~~last"])
def test_users_trigger_on_a_partition(warm: Connection, name: str) -> None:
    warm.execute(PARTED)
    warm.execute("create table low partition of docs for values from (0) to (2)")
    warm.execute("create table high partition of docs default")
    warm.execute(CHANGER)
    warm.execute(TRIGGER.format(name, "low"))
    warm.execute(DECLARE, ["deferred"])
    refill(warm)
    warm.execute("update docs set note = 'other'")
    assert vectors(warm) == [None, 1, None]
    warm.execute(TRIGGER.format(name, "high"))
    warm.execute("update docs set note = 'another'")
    assert vectors(warm) == [None, None, None]


def test_partition_with_a_users_trigger_is_attached(warm: Connection) -> None:
    columns = "(id int not null, content text, note text, embedding vector(32))"
    warm.execute(f"create table docs {columns} partition by range (id)")
    warm.execute("alter table docs add primary key (id)")
    warm.execute(DECLARE, ["deferred"])
    warm.execute(f"create table part {columns}")
    warm.execute(CHANGER)
    warm.execute(TRIGGER.format("a", "part"))
    warm.execute("alter table docs attach partition part default")
    refill(warm)
    warm.execute("update docs set note = 'other'")
    assert vectors(warm) == [None, None, None]


def test_trigger_costs_nothing_where_no_other_can_change_the_text(docs: Connection) -> None:
    """With a column list it does not even look where the text is not mentioned; a user's trigger takes that away."""
    listed = "select tgattr::text <> '' from pg_trigger where tgrelid = 'docs'::regclass and tgname ~ 'autoembed'"
    assert scalar(docs, listed) is True
    docs.execute(CHANGER)
    docs.execute(TRIGGER.format("a", "docs"))
    assert scalar(docs, listed) is False


def test_row_moves_to_another_partition(warm: Connection) -> None:
    warm.execute(PARTED)
    warm.execute("create table low partition of docs for values from (0) to (10)")
    warm.execute(DECLARE, ["deferred"])
    warm.execute("create table high partition of docs default")
    refill(warm)
    warm.execute("update docs set id = 11, content = 'new' where id = 1")
    warm.execute("update docs set id = 12 where id = 2")
    assert vectors(warm) == [None, None, 1]


# --- collations, roles of the session, search paths ----------------------------------------------------------------


@pytest.mark.parametrize("mode", ["deferred", "immediate"])
def test_caseless_texts_that_differ_in_case(warm: Connection, mode: str) -> None:
    warm.execute(CASELESS)
    warm.execute(
        "create table docs (id int primary key, content text collate caseless, note text, embedding vector(32))"
    )
    warm.execute(DECLARE, ["deferred"])
    refill(warm)
    warm.execute("select embed_column_set('docs', 'embedding', mode => %s)", [mode])
    warm.execute("update docs set content = 'ONE' where id = 1")
    far = distance(warm)[0]
    assert far is None if mode == "deferred" else (far is not None and far < 1e-5)
    assert scalar(warm, "call embed_pending()") == (2 if mode == "deferred" else 1)


def test_replica_role_clears_too(docs: Connection) -> None:
    docs.execute("set session_replication_role = replica")
    docs.execute("update docs set content = 'new' where id = 1")
    docs.execute("set session_replication_role = origin")
    assert vectors(docs) == [None, 1, None]


def test_replica_role_clears_in_partitions_old_and_new(warm: Connection) -> None:
    warm.execute(PARTED)
    warm.execute("create table low partition of docs for values from (0) to (2)")
    warm.execute(DECLARE, ["deferred"])
    warm.execute("create table high partition of docs default")
    refill(warm)
    warm.execute("set session_replication_role = replica")
    warm.execute("update docs set content = 'new'")
    warm.execute("set session_replication_role = origin")
    assert vectors(warm) == [None, None, None]


@pytest.mark.parametrize("path", ["", "pg_catalog", "evil, pg_catalog, public"])
def test_search_path_of_the_writer(docs: Connection, path: str) -> None:
    schema = scalar(docs, "select current_schema()")
    docs.execute("drop schema if exists evil cascade")
    docs.execute("create schema evil")
    for function in ("jsonb_populate_record(anyelement, jsonb) returns anyelement", "quote_ident(text) returns text"):
        docs.execute(f"create function evil.{function} language sql as 'select $1'")
    docs.execute(f"set search_path = {path or repr('')}")
    docs.execute(f"update {schema}.docs set content = 'new' where id = 1")
    docs.execute(f"set search_path = {schema}, public")
    docs.execute("drop schema evil cascade")
    assert vectors(docs) == [None, 1, None]


# --- immediate -----------------------------------------------------------------------------------------------------


def test_new_rows_have_the_vector_of_embed(live: Connection) -> None:
    live.execute("insert into docs values (1, 'one text'), (2, 'quite another, and a longer one'), (3, ' '), (4, null)")
    far = distance(live)
    assert [d is not None and d < 1e-5 for d in far] == [True, True, False, False]
    assert column(live, "select id from docs where embedding is not null order by id") == [1, 2]


def test_visible_to_others_at_commit(warm_session: Connection, live: Connection, server: object) -> None:
    schema = scalar(live, "select current_schema()")
    with psycopg.connect(live.info.dsn, autocommit=True) as other:
        live.execute("begin")
        live.execute("insert into docs values (1, 'one text')")
        assert scalar(other, f"select count(*) from {schema}.docs") == 0
        live.execute("commit")
        assert scalar(other, f"select count(embedding) from {schema}.docs") == 1


def test_changed_text_gets_its_vector_at_once(live: Connection) -> None:
    live.execute("insert into docs values (1, 'one'), (2, 'two')")
    live.execute("update docs set content = 'changed' where id = 1")
    assert max(d for d in distance(live) if d is not None) < 1e-5
    live.execute("update docs set content = null where id = 1")
    assert column(live, "select embedding is null from docs order by id") == [True, False]


def test_writers_vector_is_kept(live: Connection) -> None:
    live.execute(f"insert into docs values (1, 'one', 'n', {VECTOR})", [1])
    assert vectors(live) == [1]
    live.execute(ANYONE_WRITES)
    live.execute(f"update docs set content = 'two', embedding = {VECTOR}", [2])
    assert vectors(live) == [2]


def test_copy_merge_and_on_conflict_at_once(live: Connection) -> None:
    with live.cursor().copy("copy docs (id, content) from stdin") as copy:
        copy.write_row((1, "one"))
        copy.write_row((2, "two"))
    live.execute(
        "insert into docs values (2, 'changed'), (3, 'three') on conflict (id) do update set content = excluded.content"
    )
    live.execute(
        "merge into docs d using (values (3, 'changed too'), (4, 'four')) s (id, content) on d.id = s.id "
        "when matched then update set content = s.content "
        "when not matched then insert (id, content) values (s.id, s.content)"
    )
    far = distance(live)
    assert len(far) == 4
    assert max(9 if d is None else d for d in far) < 1e-5


def test_partitioned_table_at_once(warm: Connection) -> None:
    warm.execute(PARTED)
    warm.execute("create table low partition of docs for values from (0) to (2)")
    warm.execute(DECLARE, ["immediate"])
    warm.execute("create table high partition of docs default")
    warm.execute("insert into docs values (1, 'one'), (2, 'two')")
    assert max(9 if d is None else d for d in distance(warm)) < 1e-5


PARTS = (
    "create table low partition of docs for values from (0) to (10)",
    "create table mid partition of docs for values from (10) to (30) partition by range (id)",
    "create table mid1 partition of mid for values from (10) to (20)",
)
STATEMENT_TRIGGERS = """
    select t.tgrelid::regclass::text, count(*) from pg_trigger t join pg_class c on c.oid = t.tgrelid
    where t.tgfoid = 'autoembed.embed_rows()'::regprocedure and c.relnamespace = current_schema()::regnamespace
    group by 1 order by 1"""


@pytest.fixture
def parted(warm: Connection) -> Connection:
    """A partitioned table with an immediate column; some partitions were there before, others come later."""
    warm.execute(PARTED)
    for statement in PARTS[:2]:
        warm.execute(statement)
    warm.execute(DECLARE, ["immediate"])
    warm.execute(PARTS[2])
    warm.execute("create table later (note text, content text, embedding vector(32), id int not null)")
    warm.execute("insert into later (id, content) values (24, 'was there')")
    warm.execute("alter table mid attach partition later for values from (20) to (30)")
    return warm


@pytest.mark.parametrize("name", ["docs", "low", "mid", "mid1", "later"])
def test_statement_that_names_a_partition(parted: Connection, name: str) -> None:
    first = {"docs": 1, "low": 1, "mid": 11, "mid1": 11, "later": 21}[name]
    parted.execute("delete from docs where id = 24")
    parted.execute(
        f"insert into {name} (id, content) select n, 'text ' || n from generate_series(%s::int, %s) n",
        [first, first + 2],
    )
    assert max(9 if d is None else d for d in distance(parted)) < 1e-5
    parted.execute(f"update {name} set content = 'changed' where id = %s", [first])
    far = distance(parted)
    assert len(far) == 3
    assert max(9 if d is None else d for d in far) < 1e-5


def test_statement_triggers_stand_on_each_partition(parted: Connection) -> None:
    everywhere = [(name, 2) for name in ("docs", "later", "low", "mid", "mid1")]
    assert parted.execute(STATEMENT_TRIGGERS).fetchall() == everywhere
    parted.execute("alter table docs rename embedding to vec; alter table docs rename vec to embedding")
    assert parted.execute(STATEMENT_TRIGGERS).fetchall() == everywhere
    parted.execute("select embed_column_set('docs', 'embedding', mode => 'deferred')")
    assert parted.execute(STATEMENT_TRIGGERS).fetchall() == []
    parted.execute("select embed_column_set('docs', 'embedding', mode => 'immediate')")
    parted.execute("select embed_column_drop('docs')")
    assert parted.execute(STATEMENT_TRIGGERS).fetchall() == []


def test_large_statement_is_embedded_in_pieces(live: Connection) -> None:
    """In pieces of 128 rows."""
    with notices(live) as heard:
        live.execute("insert into docs select n, 'text ' || n from generate_series(1, 300) n")
    assert heard == []
    assert max(9 if d is None else d for d in distance(live)) < 1e-5
    pieces = "select sum(rows) from embedding_throughput where relation = 'docs'::regclass"
    assert scalar(live, pieces) == 300


def test_large_statement_with_little_time(live: Connection) -> None:
    """A piece is begun within half of the time that the statement has; the first one always is."""
    live.execute(
        "create function pause() returns trigger language plpgsql as 'begin perform pg_sleep(0.6); return null; end'"
    )
    live.execute('create trigger "a pause" after insert on docs for each statement execute function pause()')
    live.execute("set statement_timeout = '1s'")
    with notices(live) as heard:
        live.execute("insert into docs select n, 'text ' || n from generate_series(1, 300) n")
    live.execute("set statement_timeout = '60s'")
    (said,) = heard
    assert said.severity == "NOTICE"
    assert str(said.message).endswith(
        "docs.embedding: 172 of 300 new rows stay pending: the statement has more of them than there is time for"
    )
    assert scalar(live, "select count(embedding) from docs") == 128
    assert scalar(live, "call embed_pending(512)") == 172


def test_broken_model_leaves_rows_pending(warm: Connection, fragile: Path) -> None:
    warm.execute(DOCS)
    warm.execute("select embed_column('docs', 'content', model => %s, mode => 'immediate')", [fragile.name])
    (fragile / "model.safetensors").write_bytes(b"broken")
    with notices(warm) as heard:
        warm.execute("insert into docs values (1, 'a secret text')")
        warm.execute("update docs set content = 'another secret text'")
    assert vectors(warm) == [None]
    assert [n.severity for n in heard] == ["WARNING", "WARNING"]
    for said in heard:
        assert "docs.embedding: 1 of 1 new rows stays pending: " in str(said.message)
        assert "secret" not in f"{said.message} {said.hint}"


def test_missing_model_leaves_rows_pending(warm: Connection, fragile: Path) -> None:
    warm.execute(DOCS)
    warm.execute("select embed_column('docs', 'content', model => %s, mode => 'immediate')", [fragile.name])
    fragile.rename(fragile.with_name("elsewhere"))
    try:
        with notices(warm) as heard:
            warm.execute("insert into docs values (1, 'text')")
    finally:
        fragile.with_name("elsewhere").rename(fragile)
    assert vectors(warm) == [None]
    assert [n.severity for n in heard] == ["WARNING"]


def test_writer_without_update_leaves_rows_pending(live: Connection, warm_role: Callable[..., str]) -> None:
    live.execute(f"grant select, insert on docs to {warm_role('clerk')}")
    with acting_as(live, "clerk"):
        live.execute("insert into docs values (1, 'one')")
    assert vectors(live) == [None]
    live.execute("grant update on docs to clerk")
    with acting_as(live, "clerk"):
        live.execute("insert into docs values (2, 'two')")
    assert column(live, "select embedding is null from docs order by id") == [True, False]


def test_writer_without_select_leaves_rows_pending(live: Connection, warm_role: Callable[..., str]) -> None:
    live.execute(f"grant insert on docs to {warm_role('clerk')}")
    with acting_as(live, "clerk"):
        live.execute("insert into docs values (1, 'one')")
    assert vectors(live) == [None]


def test_constraint_that_refuses_the_vector_leaves_rows_pending(live: Connection) -> None:
    live.execute("alter table docs add constraint only_fine check (embedding is null or note = 'fine')")
    with notices(live) as heard:
        live.execute("insert into docs values (1, 'one', 'bad')")
        live.execute("insert into docs values (2, 'two', 'fine')")
    assert column(live, "select embedding is null from docs order by id") == [True, False]
    label = f"{scalar(live, 'select current_schema()')}.docs.embedding"
    refused = "constraint only_fine refused the vector (23514)"
    assert [n.message for n in heard] == [f"{label}: 1 of 1 new rows stays pending: {refused}"]


def test_trigger_that_names_a_constraint_of_its_own(live: Connection) -> None:
    """It can name anything: a text, say."""
    live.execute(
        "create function refuse() returns trigger language plpgsql as "
        "$$ begin raise check_violation using message = new.content, constraint = new.content; end $$"
    )
    live.execute("create trigger refuse before update on docs for each row execute function refuse()")
    with notices(live) as heard:
        live.execute("insert into docs values (1, 'a secret text')")
    (said,) = heard
    assert str(said.message).endswith("a trigger or constraint of the table refused the vector (23514)")
    assert "secret" not in str(said)


RECORDS = """
    select (select count(*) from embedding_failures where relation = 'docs'::regclass),
           (select count(*) from embedding_truncations where relation = 'docs'::regclass),
           (select sum(rows)::int from embedding_throughput where relation = 'docs'::regclass)"""


def test_refused_row_alone_stays_pending_and_is_recorded(live: Connection) -> None:
    live.execute("alter table docs add constraint only_fine check (embedding is null or note = 'fine')")
    with notices(live) as heard:
        live.execute("insert into docs values (1, 'one', 'fine'), (2, 'two', 'bad'), (3, repeat('word ', 999), 'fine')")
    (said,) = heard
    assert said.severity == "WARNING"
    assert "1 of 3 new rows stays pending: constraint only_fine refused the vector" in str(said.message)
    assert column(live, "select embedding is null from docs order by id") == [False, True, False]
    assert live.execute(RECORDS).fetchone() == (1, 1, 2)
    live.execute("update docs set content = content || '!', note = 'fine'")
    assert live.execute(RECORDS).fetchone() == (0, 1, 5)


def test_records_are_the_owners_to_write(live: Connection, warm_role: Callable[..., str]) -> None:
    live.execute(f"grant select, insert, update on docs to {warm_role('clerk')}")
    with acting_as(live, "clerk"):
        live.execute("insert into docs values (1, 'one')")
    assert vectors(live) != [None]
    assert live.execute(RECORDS).fetchone() == (0, 0, None)


def test_serializable_writers_leave_no_record(live: Connection) -> None:
    live.execute("begin isolation level serializable")
    live.execute("insert into docs values (1, 'one')")
    live.execute("commit")
    assert vectors(live) != [None]
    assert live.execute(RECORDS).fetchone() == (0, 0, None)


def test_old_figures_go_as_new_ones_come(live: Connection) -> None:
    live.execute("insert into docs select n, 'text' from generate_series(1, 3) n")
    live.execute("insert into docs values (4, 'four')")
    live.execute("update autoembed.run set finished = finished - interval '2 days'")
    live.execute("insert into docs values (5, 'five')")
    assert scalar(live, "select count(*) from autoembed.run") == 1


def test_paused_column_embeds_nothing(live: Connection) -> None:
    live.execute("select embed_column_set('docs', 'embedding', enabled => false)")
    live.execute("insert into docs values (1, 'one')")
    assert vectors(live) == [None]
    live.execute(f"update docs set embedding = {VECTOR}", [1])
    live.execute("update docs set content = 'two'")
    assert vectors(live) == [None]


def test_statement_timeout_goes_through(warm: Connection) -> None:
    """128 long texts take the model seconds; the statement is cancelled within two, and nothing of it stays."""
    warm.execute("create table docs (id int primary key, content text, embedding vector(384))")
    warm.execute("select embed_column('docs', 'content', model => 'all-MiniLM-L6-v2', mode => 'immediate')")
    warm.execute("insert into docs values (0, 'loads the model')")
    warm.execute("set statement_timeout = '300ms'")
    error = refusal(warm, "insert into docs select n, repeat('word ' || n, 300) from generate_series(1, 128) n")
    warm.execute("set statement_timeout = '60s'")
    assert error.sqlstate == "57014"
    assert column(warm, "select id from docs") == [0]


def test_mode_changes_there_and_back(docs: Connection) -> None:
    docs.execute("select embed_column_set('docs', 'embedding', mode => 'immediate')")
    docs.execute("insert into docs values (4, 'four')")
    docs.execute("select embed_column_set('docs', 'embedding', mode => 'deferred')")
    docs.execute("insert into docs values (5, 'five')")
    assert column(docs, "select embedding is null from docs where id > 3 order by id") == [False, True]


def test_two_immediate_targets_with_two_models(warm: Connection) -> None:
    warm.execute("create table docs (id int primary key, content text, small vector(32), large vector(384))")
    warm.execute("select embed_column('docs', 'content', 'small', %s, 'immediate')", [TINY])
    warm.execute("select embed_column('docs', 'content', 'large', 'all-MiniLM-L6-v2', 'immediate')")
    warm.execute("insert into docs values (1, 'one')")
    assert warm.execute("select small is null, large is null from docs").fetchone() == (False, False)


@pytest.mark.parametrize("mode", ["deferred", "immediate"])
@pytest.mark.parametrize("change", ["trim(new.content)", "new.content || '!'"])
def test_users_trigger_that_changes_the_text_in_our_own_write(warm: Connection, mode: str, change: str) -> None:
    """The vector that we write is no writer's word: where the text changes under it, it goes again."""
    warm.execute(DOCS)
    warm.execute(CHANGER.replace("new.content || ' and ' || new.note", change))
    warm.execute(TRIGGER.format("a", "docs"))
    warm.execute(DECLARE, [mode])
    warm.execute("insert into docs values (1, ' one '), (2, 'two')")
    warm.execute("call embed_pending()")
    assert all(far is None or far < 1e-5 for far in distance(warm))
    if change.startswith("trim"):
        assert None not in distance(warm)


def test_own_write_does_not_call_itself(warm: Connection) -> None:
    """Else one INSERT would embed, and change, its row for ever."""
    warm.execute(DOCS)
    warm.execute(CHANGER.replace("' and ' || new.note", "'!'"))
    warm.execute(TRIGGER.format("a", "docs"))
    warm.execute(DECLARE, ["immediate"])
    warm.execute("insert into docs values (1, 'one')")
    assert len(scalar(warm, "select content from docs")) < 10
