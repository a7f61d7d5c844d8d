"""Living on: renamed, dropped, dumped and restored. A declaration goes where its table goes, and ends with it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psycopg
import pytest

from support.server import Connection, Server, pg_config
from support.talk import TINY, VECTOR, column, refusal, scalar

pytest_plugins = ["support.warm"]

DOCS = "create table docs (id int primary key, content text, note text, embedding vector(32))"
DECLARE = "select embed_column('docs', 'content', model => 'tiny-mpnet', mode => %s)"
STATE = ("registration", "run", "failure", "truncation", "inflight", "inflight_twin", "suspect")


def fill(connection: Connection) -> int:
    return int(scalar(connection, "call embed_pending()"))


def left_behind(connection: Connection) -> dict[str, int]:
    """Rows of state that belong to no declared column of today."""
    found = {"registration": scalar(connection, "select count(*) from autoembed.registration")}
    for state in ("run", "failure", "truncation", "inflight", "suspect"):
        found[state] = scalar(connection, f"select count(*) from autoembed.{state}")
    return {state: rows for state, rows in found.items() if rows}


def give_it_state(connection: Connection) -> None:
    """A failure, a truncation and a run for each registration."""
    for statement in (
        "insert into autoembed.failure (registration, key, hash, kind, message) "
        "select id, '[1]', '', 'encoder', 'm' from autoembed.registration",
        "insert into autoembed.truncation (registration, key, tokens, token_limit) "
        "select id, '[1]', 9, 8 from autoembed.registration",
        "insert into autoembed.run (registration, model, embedded, failed, skipped, tokens, claim_seconds, "
        "encode_seconds, write_seconds) select id, model, 1, 0, 0, 1, 1, 1, 1 from autoembed.registration",
        "insert into autoembed.suspect select id, '[1]', '' from autoembed.registration",
    ):
        connection.execute(statement)


# --- renamed -------------------------------------------------------------------------------------------------------

RENAMES = {
    "table": ("alter table docs rename to papers", "papers", "id", "content", "embedding"),
    "source": ('alter table docs rename content to "the body"', "docs", "id", "the body", "embedding"),
    "target": ('alter table docs rename embedding to "the vector"', "docs", "id", "content", "the vector"),
    "key": ("alter table docs rename id to number", "docs", "number", "content", "embedding"),
    "names swapped": (
        "alter table docs rename content to x; alter table docs rename note to content; "
        "alter table docs rename x to note",
        "docs",
        "id",
        "note",
        "embedding",
    ),
    "moved": ("create schema other; alter table docs set schema other", "other.docs", "id", "content", "embedding"),
    "schema": ("alter schema {} rename to renamed", "renamed.docs", "id", "content", "embedding"),
}


@pytest.mark.parametrize("case", RENAMES)
@pytest.mark.parametrize("mode", ["deferred", "immediate"])
def test_renamed(warm: Connection, case: str, mode: str) -> None:
    """Listed under the new names, filled, cleared, searched and dropped."""
    statements, table, key, source, target = RENAMES[case]
    schema = scalar(warm, "select current_schema()")
    warm.execute(DOCS)
    warm.execute(DECLARE, [mode])
    warm.execute(f"insert into docs values (1, 'one', 'n', {VECTOR})", [1])
    for statement in statements.format(schema).split("; "):
        warm.execute(statement)
    try:
        listed = "select relation::text, source::text[], target::text, mode, status from embedding_columns"
        assert warm.execute(listed).fetchall() == [(table, [source], target, mode, "ready")]
        quoted = (f'"{source}"', f'"{target}"')
        warm.execute(f"update {table} set {quoted[0]} = 'two'")
        assert scalar(warm, f"select {quoted[1]} is null from {table}") is (mode == "deferred")
        assert fill(warm) == (mode == "deferred")
        far = f"select {quoted[1]} <-> embed({quoted[0]}, 'tiny-mpnet', 'document') from {table}"
        assert scalar(warm, far) < 1e-5
        search = "select key from embed_search(%s::regclass, 'two', target => %s)"
        assert scalar(warm, search, [table, target]) == {key: 1}
        warm.execute("select embed_column_drop(%s::regclass, %s)", [table, target])
        assert left_behind(warm) == {}
        assert scalar(warm, f"select count(*) from pg_trigger where tgrelid = '{table}'::regclass") == 0
    finally:
        if case == "schema":
            warm.execute(f"alter schema renamed rename to {schema}")
        warm.execute("drop schema if exists other cascade")


def test_attribute_of_a_typed_table_is_renamed(warm: Connection) -> None:
    warm.execute("create type doc as (id int, content text, embedding vector(32))")
    warm.execute("create table docs of doc (primary key (id))")
    warm.execute(DECLARE, ["deferred"])
    warm.execute(f"insert into docs values (1, 'one', {VECTOR})", [1])
    warm.execute("alter type doc rename attribute embedding to meaning cascade")
    warm.execute("update docs set content = 'two'")
    assert scalar(warm, "select meaning is null from docs")
    assert fill(warm) == 1


def test_column_of_a_partitioned_table_is_renamed(warm: Connection) -> None:
    warm.execute(f"{DOCS} partition by list (id)")
    warm.execute("create table part partition of docs default")
    warm.execute(DECLARE, ["immediate"])
    warm.execute("alter table docs rename content to body")
    warm.execute("alter table docs rename embedding to meaning")
    warm.execute("insert into docs values (1, 'one')")
    warm.execute("update part set body = 'two'")
    assert scalar(warm, "select meaning is null or meaning <-> embed('two', 'tiny-mpnet', 'document') < 1e-5 from docs")


def test_owner_who_is_nobody_special_renames(warm: Connection, warm_role: Callable[..., str]) -> None:
    alice = warm_role("alice")
    warm.execute(DOCS)
    warm.execute(DECLARE, ["deferred"])
    warm.execute(f"alter table docs owner to {alice}")
    warm.execute("set role alice")
    warm.execute("alter table docs rename embedding to meaning")
    warm.execute("alter table docs rename to papers")
    warm.execute("reset role")
    listed = "select relation::text, target::text, status from embedding_columns"
    assert warm.execute(listed).fetchall() == [("papers", "meaning", "ready")]


# --- dropped -------------------------------------------------------------------------------------------------------

DROPS = {
    "table": "drop table docs",
    "target": "alter table docs drop column embedding cascade",
    "source": "alter table docs drop column content cascade",
    "trigger": "{trigger}",
    "owned": "drop owned by alice",
}


@pytest.mark.parametrize("case", DROPS)
@pytest.mark.parametrize("mode", ["deferred", "immediate"])
def test_dropped(warm: Connection, warm_role: Callable[..., str], case: str, mode: str) -> None:
    """Without CASCADE where PostgreSQL lets a column with a trigger go without; others' declarations stay."""
    alice = warm_role("alice")
    warm.execute(DOCS)
    warm.execute(DECLARE, [mode])
    give_it_state(warm)
    warm.execute(f"alter table docs owner to {alice}")
    warm.execute("create table others (id int primary key, content text, embedding vector(32))")
    warm.execute("select embed_column('others', 'content', model => 'tiny-mpnet')")
    ours = "select tgname from pg_trigger where tgrelid = 'docs'::regclass and tgtype & 19 = 19"
    warm.execute(DROPS[case].format(trigger=f'drop trigger "{scalar(warm, ours)}" on docs'))
    assert left_behind(warm) == {"registration": 1}
    assert column(warm, "select relation::text from embedding_columns") == ["others"]
    if case in ("target", "source", "trigger"):
        assert scalar(warm, "select count(*) from pg_trigger where tgrelid = 'docs'::regclass") == 0
        indexes = "select indexrelid::regclass::text from pg_index where indrelid = 'docs'::regclass"
        assert column(warm, indexes) == ["docs_pkey"]


def test_dropped_with_its_schema(warm: Connection) -> None:
    warm.execute("create schema doomed")
    warm.execute("create table doomed.docs (id int primary key, content text, embedding vector(32))")
    warm.execute("select embed_column('doomed.docs', 'content', model => 'tiny-mpnet')")
    give_it_state(warm)
    warm.execute("drop schema doomed cascade")
    assert left_behind(warm) == {}


def test_source_is_not_dropped_by_accident(warm: Connection) -> None:
    """Triggers hold the columns that they compare, as PostgreSQL has it."""
    warm.execute(DOCS)
    warm.execute(DECLARE, ["deferred"])
    assert refusal(warm, "alter table docs drop column content").sqlstate == "2BP01"
    assert scalar(warm, "select count(*) from autoembed.registration") == 1


def test_key_is_dropped_and_comes_back(warm: Connection) -> None:
    warm.execute(DOCS)
    warm.execute(DECLARE, ["deferred"])
    warm.execute("insert into docs values (1, 'one')")
    warm.execute("alter table docs drop constraint docs_pkey")
    assert "no key" in scalar(warm, "select status from embedding_columns")
    fill(warm)
    assert scalar(warm, "select embedding is null from docs")
    warm.execute("alter table docs add primary key (id)")
    assert scalar(warm, "select status from embedding_columns") == "ready"
    assert fill(warm) == 1


def test_table_is_truncated_rewritten_and_given_away(warm: Connection, warm_role: Callable[..., str]) -> None:
    warm.execute(DOCS)
    warm.execute(DECLARE, ["deferred"])
    warm.execute("truncate docs")
    warm.execute("alter table docs add column more float default random()")
    warm.execute("insert into docs values (1, 'one')")
    warm.execute("vacuum full docs")
    assert fill(warm) == 1
    warm.execute(f"alter table docs owner to {warm_role('alice')}")
    warm.execute("insert into docs values (2, 'two')")
    assert fill(warm) == 0


def test_triggers_switched_off_and_on(warm: Connection) -> None:
    """As pg_restore --disable-triggers does. Ours must fire in replica sessions afterwards, too."""
    warm.execute(DOCS)
    warm.execute(DECLARE, ["deferred"])
    warm.execute(f"insert into docs values (1, 'one', 'n', {VECTOR})", [1])
    warm.execute("alter table docs disable trigger all")
    warm.execute("alter table docs enable trigger all")
    warm.execute("set session_replication_role = replica")
    warm.execute("update docs set content = 'two'")
    assert scalar(warm, "select embedding is null from docs")


def test_temporary_table_cannot_be_smuggled_in(warm: Connection) -> None:
    """No event tells of a temporary table's end, so no declaration may stand on one."""
    warm.execute("create temp table brief (id int primary key, content text, embedding vector(32))")
    make = (
        "create trigger smuggled before update on brief for each row "
        f"execute function autoembed.invalidate('embedding', '{TINY}', '', 'deferred', 'true', '{{}}', 'content')"
    )
    try:
        warm.execute(make)
    except psycopg.Error:
        pass
    else:
        assert left_behind(warm) == {}
    finally:
        warm.execute("drop table brief")


def test_extension_goes_without_cascade(db: Connection, tiny: str) -> None:
    db.execute(DOCS)
    db.execute("create table others (id int primary key, content text, embedding vector(32)) partition by list (id)")
    db.execute("create table part partition of others default")
    db.execute(f"insert into docs values (1, 'one', 'n', {VECTOR})", [1])
    db.execute(DECLARE, ["immediate"])
    db.execute("select embed_column('others', 'content', model => 'tiny-mpnet')")
    db.execute("select embed_index('docs')")
    db.execute("drop extension pg_autoembed")
    assert column(db, "select evtname from pg_event_trigger") == []
    assert scalar(db, "select to_regnamespace('autoembed')") is None
    assert column(db, "select tgname from pg_trigger where not tgisinternal") == []
    indexes = "select indexrelid::regclass::text from pg_index where indrelid::regclass::text in ('docs', 'others')"
    assert sorted(column(db, indexes)) == ["docs_embedding_hnsw", "docs_pkey", "others_pkey"]
    db.execute("update docs set content = 'two'")
    assert scalar(db, "select embedding is not null from docs")
    db.execute("create extension pg_autoembed")
    db.execute(DECLARE, ["deferred"])
    db.execute("update docs set content = 'three'")
    assert scalar(db, "select embedding is null from docs")


# --- dumped and restored -------------------------------------------------------------------------------------------

DECLARATIONS = (
    "select relation::text, source::text[], target::text, model, fingerprint, mode, enabled, dimensions, status "
    "from embedding_columns order by 1, 3"
)
Restore = Callable[..., Connection]


@pytest.fixture
def original(db: Connection, tiny: str) -> Connection:
    """Two tables of a superuser's and one with awkward names, in all modes; one row pending, one filled each."""
    db.execute('create schema "odd one"')
    tables = {
        "docs": ("array['content', 'note']", "immediate"),
        "papers": ("'content'", "deferred"),
        '"odd one"."Odd, ""table"""': ("'content'", "deferred"),
    }
    for table, (source, mode) in tables.items():
        db.execute(
            f"create table {table} (gone int, id int primary key, content text, note text, embedding vector(32))"
        )
        db.execute(f"alter table {table} drop column gone")
        filled = f"(1, 'one', 'n', {VECTOR}), (2, 'two', 'n', {VECTOR})"
        db.execute(f"insert into {table} values {filled}", [1, 1])
        db.execute(f"select embed_column(%s::regclass, {source}, 'embedding', %s)", [table, TINY])
        db.execute(f"update {table} set embedding = null where id = 2")
        db.execute("select embed_column_set(%s::regclass, 'embedding', mode => %s)", [table, mode])
    db.execute("select embed_column_set('papers', 'embedding', enabled => false)")
    return db


@pytest.fixture
def restore(original: Connection, connect: Callable[..., Connection], tmp_path: Path) -> Iterator[Restore]:
    """restore(*options, into=[statements], role="postgres"): what pg_dump wrote, in another database."""
    names: list[str] = []

    def another(*options: str, into: Sequence[str] = (), role: str = "postgres", custom: bool = False) -> Connection:
        names.append(f"{original.info.dbname}_copy{len(names)}")
        original.execute(f"create database {names[-1]} template template0")
        copy = connect(dbname=names[-1])
        for statement in into:
            copy.execute(statement)
        dump = tmp_path / "dump"
        shape = ["--format=custom"] if custom else []
        run("pg_dump", original, original.info.dbname, role, *shape, f"--file={dump}", *options)
        if custom:
            run("pg_restore", original, names[-1], role, "--jobs=2", "--exit-on-error", str(dump))
        else:
            run("psql", original, names[-1], role, "--quiet", "--no-psqlrc", "-v", "ON_ERROR_STOP=1", "-f", str(dump))
        return copy

    yield another
    for name in names:
        original.execute(f"drop database {name} with (force)")


def run(program: str, connection: Connection, dbname: str, role: str, *options: str) -> None:
    where = [f"--host={connection.info.host}", f"--port={connection.info.port}", f"--username={role}"]
    command = [str(pg_config("--bindir") / program), *where, f"--dbname={dbname}", *options]
    subprocess.run(command, check=True, capture_output=True)


def machinery(connection: Connection, relation: str) -> list[tuple[Any, ...]]:
    """Its triggers and indexes, with whether they go with the extension."""
    return connection.execute(
        "select o.name, o.firing, exists (select from pg_depend d where d.objid = o.oid and d.deptype = 'x') from ("
        "    select t.oid, t.tgname::text, t.tgenabled::text from pg_trigger t where t.tgrelid = %(relation)s::regclass"
        "    union all"
        "    select c.oid, c.relname::text, '' from pg_index i join pg_class c on c.oid = i.indexrelid"
        "    where i.indrelid = %(relation)s::regclass) o (oid, name, firing) order by 1",
        {"relation": relation},
    ).fetchall()


@pytest.mark.parametrize("custom", [False, True])
def test_whole_database(original: Connection, restore: Restore, custom: bool) -> None:
    copy = restore(custom=custom)
    before = original.execute(DECLARATIONS).fetchall()
    assert [row[5:7] for row in before] == [("deferred", True), ("immediate", True), ("deferred", False)]
    assert copy.execute(DECLARATIONS).fetchall() == before
    for relation in ("docs", "papers", '"odd one"."Odd, ""table"""'):
        assert machinery(copy, relation) == machinery(original, relation)
    for relation in ("docs", "papers"):
        assert scalar(copy, f"select count(embedding) from {relation}") == 1
        copy.execute(f"update {relation} set content = ' ', note = ' '")
        assert scalar(copy, f"select count(embedding) from {relation}") == 0
    copy.execute("drop extension pg_autoembed")


def test_restored_table_is_filled(original: Connection, restore: Restore) -> None:
    copy = restore("--table=docs", into=["create extension pg_autoembed cascade"])
    assert copy.execute(DECLARATIONS).fetchall() == original.execute(DECLARATIONS).fetchall()[1:2]
    assert fill(copy) == 1
    copy.execute("insert into docs values (3, 'three')")
    assert scalar(copy, "select count(embedding) from docs") == 3


def test_without_one_table(original: Connection, restore: Restore) -> None:
    copy = restore("--exclude-table=docs")
    before = original.execute(DECLARATIONS).fetchall()
    assert copy.execute(DECLARATIONS).fetchall() == [before[0], before[2]]


@pytest.mark.parametrize("custom", [False, True])
def test_partitioned_table_with_an_immediate_column(original: Connection, restore: Restore, custom: bool) -> None:
    """Its partitions have statement triggers of their own, which come with the dump as well."""
    original.execute(
        "create table parted (id int primary key, content text, embedding vector(32)) partition by list (id)"
    )
    original.execute("create table part partition of parted for values in (1, 2)")
    original.execute("select embed_column('parted', 'content', 'embedding', %s, 'immediate')", [TINY])
    copy = restore(custom=custom)
    for relation in ("parted", "part"):
        assert len(machinery(copy, relation)) == 5
        assert machinery(copy, relation) == machinery(original, relation)
    copy.execute("insert into part values (1, 'one')")
    copy.execute("create table part2 partition of parted default")
    copy.execute("insert into part2 values (3, 'three')")
    assert scalar(copy, "select count(embedding) from parted") == 2


def test_schema_only(original: Connection, restore: Restore) -> None:
    copy = restore("--schema-only")
    assert copy.execute(DECLARATIONS).fetchall() == original.execute(DECLARATIONS).fetchall()
    copy.execute("insert into papers values (1, 'one'), (2, null)")
    progress = "select total, pending, blank from embedding_progress where relation = 'papers'::regclass"
    assert copy.execute(progress).fetchone() == (2, 1, 1)


def test_restored_over_what_is_there(original: Connection, restore: Restore, tmp_path: Path) -> None:
    """pg_dump --clean drops and makes each table again."""
    copy = restore("--table=docs", "--table=papers", into=["create extension pg_autoembed cascade"])
    dump = str(tmp_path / "clean")
    clean = ("--clean", "--if-exists", "--table=docs", f"--file={dump}")
    run("pg_dump", original, original.info.dbname, "postgres", *clean)
    copy.execute("drop table docs")
    for _ in range(2):
        run("psql", copy, copy.info.dbname, "postgres", "--quiet", "--no-psqlrc", "-v", "ON_ERROR_STOP=1", "-f", dump)
        assert column(copy, "select relation::text from embedding_columns order by 1") == ["docs", "papers"]


def test_owner_restores_his_table(original: Connection, restore: Restore, role: Callable[..., str]) -> None:
    alice = role("alice")
    original.execute(f"alter table docs owner to {alice}")
    grants = ["create extension pg_autoembed cascade", f"grant create on schema public to {alice}"]
    copy = restore("--table=docs", into=grants, role=alice)
    assert copy.execute(DECLARATIONS).fetchall() == original.execute(DECLARATIONS).fetchall()[1:2]


def test_restored_where_the_model_is_missing(original: Connection, restore: Restore, fragile: Path) -> None:
    name = fragile.name
    original.execute("select embed_column_set('papers', 'embedding', model => %s, enabled => true)", [name])
    fingerprint = scalar(original, "select fingerprint from embedding_columns where model = %s", [name])
    fragile.rename(fragile.with_name("elsewhere"))
    try:
        copy = restore()
        row = copy.execute("select fingerprint, status from embedding_columns where model = %s", [name]).fetchone()
        assert row == (fingerprint, "model missing: add it with `autoembed model add`")
        error = refusal(copy, "call embed_pending(relation => 'papers')")
        assert error.sqlstate == "22023"
        assert f'model "{name}" is not in the model directory' in str(error.diag.message_primary)
    finally:
        fragile.with_name("elsewhere").rename(fragile)
    assert scalar(copy, "select status from embedding_columns where model = %s", [name]) == "ready"


@pytest.mark.slow
def test_server_is_upgraded(make_server: Callable[..., Server], tiny: str, tmp_path: Path) -> None:
    """pg_upgrade keeps the relations' oids and nobody else's, and runs no event trigger on its way."""
    old, new = make_server(), make_server()
    with old.connect() as connection:
        connection.execute(DOCS)
        connection.execute(DECLARE, ["immediate"])
        connection.execute(f"insert into docs values (1, 'one', 'n', {VECTOR})", [1])
        connection.execute("create table doomed (id int)")
        before = connection.execute(DECLARATIONS).fetchall()
    with new.connect("postgres") as connection:
        connection.execute("drop database autoembed")
    old.stop()
    new.stop()
    bin_dir = pg_config("--bindir")
    options = {
        "-b": bin_dir,
        "-B": bin_dir,
        "-d": old.directory / "data",
        "-D": new.directory / "data",
        "-s": old.sockets,
    }
    command = [bin_dir / "pg_upgrade", "-U", "postgres", *(each for pair in options.items() for each in pair)]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, cwd=tmp_path)
    new.start()
    with new.connect() as connection:
        connection.execute("drop table doomed")
        assert connection.execute(DECLARATIONS).fetchall() == before
        connection.execute("alter table docs rename embedding to meaning")
        connection.execute("update docs set content = ' '")
        assert scalar(connection, "select meaning is null from docs")
