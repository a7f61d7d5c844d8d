"""The extension's own upgrade, from a release to the next: state lives on, and the result equals a fresh install.

The next releases are made here: the sources with realistic changes, an upgrade script, and a site beside the present
one. They are installed into a private copy of PostgreSQL, which finds its share directory from where its programs are.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import psycopg
import pytest

from support.rig import make_rig
from support.rigging import Rig, fill, leftovers, pending, rows, scalar
from support.server import DATABASE, Connection, pg_config, site
from support.snapshot import Snapshot, differences, snapshot
from support.talk import notices, refusal

ROOT = Path(__file__).parents[1]
CONTROL = (ROOT / "pg_autoembed.control").read_text()
VERSION = re.search("default_version = '(.*)'", CONTROL)[1]  # type: ignore[index]
NEXT, LATER = f"{VERSION}.next", f"{VERSION}.next.later"
NUMBERS = count(1)
STATEMENT = "\n-- next statement\n"

# --- the next release ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """A change of the sources, and the statement that makes it in a database."""

    file: str
    former: str  # '' where it is added to the file's end
    present: str
    upgrade: str  # 'replace function f' stands for f's present definition
    touched: tuple[str, ...]  # what is not as it should be where the upgrade script forgets the statement


def change(file: str, former: str, present: str, upgrade: str, *touched: str) -> Change:
    return Change(file, former, present, upgrade, touched)


def added(file: str, statement: str, *touched: str) -> Change:
    return Change(file, "", f"\n{statement};\n", statement, touched)


KINDS = "check (kind in ('encoder', 'vector', 'memory', 'write', 'crashed'))"
MORE_KINDS = KINDS.replace("'crashed'", "'crashed', 'refused'")
NOTES = "95_notes.sql"
RELEASE_OF = """create function embed_release() returns text
language sql stable
begin atomic
    select 'next'::text;
end"""
RUN_SECONDS = "    write_seconds double precision not null\n);"
WITH_DEVICE = RUN_SECONDS.replace("not null\n", "not null,\n    device text\n")
UNLOADING = """unload_models(out count integer, out refusal autoembed.refusal)
language plpython3u volatile parallel unsafe as $$
"""
DDL_TAGS = "when tag in ('CREATE TABLE', 'CREATE TRIGGER', 'ALTER TRIGGER', 'ALTER TABLE', 'ALTER TYPE')"

CHANGES = {
    "column": change(
        "10_state.sql",
        RUN_SECONDS,
        WITH_DEVICE,
        "alter table autoembed.run add column device text",
        "table autoembed.run",
    ),
    "constraint": change(
        "10_state.sql",
        KINDS,
        MORE_KINDS,
        f"alter table autoembed.failure drop constraint failure_kind_check, add {MORE_KINDS}",
        "table constraint failure_kind_check on autoembed.failure",
    ),
    "index": added(
        "10_state.sql", "create index run_finished on autoembed.run (finished)", "index autoembed.run_finished"
    ),
    "function": change(
        "72_write.sql",
        "attempts < 5",
        "attempts < 6",
        "replace function autoembed.next_try",
        "function autoembed.next_try(pg_catalog.text,integer)",
    ),
    "function in Python": change(
        "88_sessions.sql",
        UNLOADING,
        f"{UNLOADING}# all of them\n",
        "replace function autoembed.unload_models",
        "function autoembed.unload_models()",
    ),
    "way to the package": change(  # the site is another one with each release
        "30_python.sql", "", "", "replace function autoembed.start", "function autoembed.start()"
    ),
    "view": change(
        "90_views.sql",
        "f.attempts, f.last_try, f.next_try\n",
        "f.attempts, f.last_try, f.next_try, f.checked\n",
        "replace view embedding_failures",
        "view @extschema@.embedding_failures",
    ),
    "comment": change(
        "88_sessions.sql",
        "'Frees the models that this session has loaded, and returns how many there were.'",
        "'Frees the models of this session.'",
        "comment on function embed_unload() is 'Frees the models of this session.'",
        "function @extschema@.embed_unload()",
    ),
    "event trigger": change(
        "63_ddl_events.sql",
        DDL_TAGS,
        DDL_TAGS.replace("'ALTER TYPE'", "'ALTER TYPE', 'ALTER DOMAIN'"),
        "drop event trigger autoembed_on_ddl; create event trigger autoembed_on_ddl on ddl_command_end "
        + DDL_TAGS.replace("'ALTER TYPE'", "'ALTER TYPE', 'ALTER DOMAIN'")
        + " execute function autoembed.on_ddl(); alter event trigger autoembed_on_ddl enable always",
        "event trigger autoembed_on_ddl",
    ),
    "new function": added(NOTES, RELEASE_OF, "function @extschema@.embed_release()"),
    "revoke": added(
        NOTES, "revoke all on function embed_release() from public", "function @extschema@.embed_release()"
    ),
    "grant": added(
        NOTES, "grant execute on function embed_release() to pg_monitor", "function @extschema@.embed_release()"
    ),
    "new table": added(
        NOTES,
        "create table autoembed.note (id bigint generated always as identity primary key, note text default '-',\n"
        "    registration bigint not null references autoembed.registration on delete cascade)",
        "table autoembed.note",
    ),
    "row-level security": added(NOTES, "alter table autoembed.note enable row level security", "table autoembed.note"),
    "policy": added(
        NOTES,
        "create policy owner on autoembed.note using (registration in (select r.id from autoembed.registration r))",
        "policy owner on autoembed.note",
    ),
    "grant on the table": added(
        NOTES, "grant select (registration), insert on autoembed.note to public", "table autoembed.note"
    ),
    "dumped": added(
        NOTES, "select pg_extension_config_dump('autoembed.note', 'where note is not null')", "extension pg_autoembed"
    ),
}
# It travels through the package as text, so a change of it is a change of the interface between SQL and package.
LATER_CHANGES = {
    "attribute": change(
        "20_column_sql.sql",
        "    beyond text             -- condition: row t comes after the key $1\n);",
        "    beyond text,            -- condition: row t comes after the key $1\n    note text\n);",
        "alter type autoembed.column_sql add attribute note text",
        "type autoembed.column_sql",
        "function autoembed.own_counts(bigint)",
    ),
    "function bound to the type": change(  # its stored form lists the attributes
        "90_views.sql", "", "", "replace function autoembed.own_counts", "function autoembed.own_counts(bigint)"
    ),
}
FORGETTABLE = [name for name in CHANGES if not name.startswith("new")]  # without what others build on


def definition(script: str, kind: str, name: str) -> str:
    """What the install script says to create the object."""
    end = ";$" if kind == "view" else r"^(?:\$\$|end);$"
    found = re.search(rf"^create {kind} {re.escape(name)}[ (].*?{end}", script, re.DOTALL | re.MULTILINE)
    assert found, f"{kind} {name} is not in the install script"
    return found[0]


def statement(script: str, upgrade: str) -> str:
    if not upgrade.startswith("replace "):
        return f"{upgrade};"
    _, kind, name = upgrade.split()
    return definition(script, kind, name).replace("create", "create or replace", 1)


class Release:
    """The sources of a release after the present one, to be installed as `make install` does."""

    def __init__(self, directory: Path, sources: Path, former: str, version: str) -> None:
        self.directory = directory
        self.former = former
        self.version = version
        shutil.copytree(sources / "sql", directory / "sql", ignore=shutil.ignore_patterns("upgrade"))
        shutil.copytree(sources / "scripts", directory / "scripts")
        shutil.copy(sources / "pgxs.mk", directory)
        control = CONTROL.replace(f"'{VERSION}'", f"'{version}'")
        (directory / "pg_autoembed.control").write_text(control)
        (directory / "sql/upgrade").mkdir()

    @property
    def script(self) -> str:
        return "".join(path.read_text() for path in sorted((self.directory / "sql").glob("*.sql")))

    def make(self, made: Change) -> None:
        path = self.directory / "sql" / made.file
        text = path.read_text() if path.exists() else ""
        assert made.former in text, f"{made.file} does not say {made.former!r} any more"
        path.write_text(text.replace(made.former, made.present) if made.former else text + made.present)

    def bring(self, statements: Sequence[str]) -> None:
        """The upgrade script."""
        script = self.directory / "sql/upgrade" / f"pg_autoembed--{self.former}--{self.version}.sql"
        script.write_text(STATEMENT.join(["", *statements]))

    def install(self) -> None:
        environment = {"DESTDIR": "/", "AUTOEMBED_BIN": str(self.directory / "bin")}
        subprocess.run([self.directory / "scripts/extension.sh"], env={**os.environ, **environment}, check=True)


def copy_postgres(directory: Path) -> Path:
    """Programs and share directory of the installed PostgreSQL, its libraries by link; returns pg_config."""
    bin_dir, share, libraries = (pg_config(option) for option in ("--bindir", "--sharedir", "--pkglibdir"))
    top = Path(os.path.commonpath([bin_dir, share, libraries]))
    own = {path: directory / path.relative_to(top) for path in (bin_dir, share, libraries)}
    own[bin_dir].mkdir(parents=True)
    for program in ("postgres", "initdb", "pg_ctl", "pg_config"):
        shutil.copy2(bin_dir / program, own[bin_dir])
    shutil.copytree(share, own[share], ignore=shutil.ignore_patterns("man"))
    link_all(libraries, own[libraries], "pg_autoembed")
    link_all(libraries / "pg_autoembed", own[libraries] / "pg_autoembed")
    return own[bin_dir] / "pg_config"


def link_all(source: Path, target: Path, *without: str) -> None:
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.name not in without:
            (target / path.name).symlink_to(path)


def install_site(version: str, edits: dict[str, str]) -> None:
    """A site of its own for a release, with a package that differs."""
    (present,) = site().with_name(VERSION).glob("lib/python*/site-packages")
    target = pg_config("--pkglibdir") / "pg_autoembed" / version / Path(*present.parts[-3:])
    link_all(present, target, "autoembed")
    shutil.copytree(present / "autoembed", target / "autoembed", ignore=shutil.ignore_patterns("__pycache__"))
    package = target / "autoembed/__init__.py"
    text = package.read_text()
    for former, new in edits.items():
        assert former in text
        text = text.replace(former, new)
    package.write_text(text)


def next_release(directory: Path) -> Release:
    release = Release(directory, ROOT, VERSION, NEXT)
    for made in CHANGES.values():
        release.make(made)
    release.bring([statement(release.script, made.upgrade) for made in CHANGES.values()])
    return release


def later_release(directory: Path, former: Release) -> Release:
    """The package and the SQL that calls it speak another version of their interface."""
    release = Release(directory, former.directory, NEXT, LATER)
    for path in (directory / "sql").glob("*.sql"):
        text = path.read_text().replace('"autoembed 1"', '"autoembed 2"')
        path.write_text(text.replace("api_version=1", "api_version=2"))
    for made in LATER_CHANGES.values():
        release.make(made)
    in_python = r"^create (?:function|procedure) [\w.]+\([^$;]*?language plpython3u.*?^\$\$;"
    bodies = re.findall(in_python, release.script, re.DOTALL | re.MULTILINE)
    assert len(bodies) == release.script.count("language plpython3u")
    changed = [statement(release.script, made.upgrade) for made in LATER_CHANGES.values()]
    release.bring([*changed, *(body.replace("create", "create or replace", 1) for body in bodies)])
    return release


@dataclass
class Releases:
    """A server on which the present release is created and the next ones are installed."""

    rig: Rig

    def connect(self, database: str) -> Connection:
        return self.rig.server.connect(database)


@pytest.fixture(scope="module")
def releases(backend_coverage: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Releases]:
    """A server of the private copy, with the present release created and the next ones in place."""
    home = tmp_path_factory.mktemp("releases")
    private = copy_postgres(home / "postgresql")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PG_CONFIG", str(private))
        rig = make_rig(home / "rig", backend_coverage, {"max_connections": 20})
        try:
            following = next_release(home / NEXT)
            following.install()
            install_site(NEXT, {})
            later_release(home / LATER, following).install()
            install_site(LATER, {"API_VERSION = 1": "API_VERSION = 2"})
            yield Releases(rig)
        finally:
            rig.reset()
            rig.server.destroy()


@pytest.fixture
def db(releases: Releases) -> Iterator[Connection]:
    """A database with the present release, the next ones being installed on the machine."""
    name = f"upgraded{next(NUMBERS)}"
    with releases.connect("postgres") as administrator:
        administrator.execute(f"create database {name} template {DATABASE}")
    with releases.connect(name) as connection:
        yield connection


def update(connection: Connection, version: str) -> None:
    connection.execute(f"alter extension pg_autoembed update to '{version}'")


@pytest.fixture(scope="module")
def bare(releases: Releases) -> Iterator[Connection]:
    """A database without the extension; what a test installs goes with its transaction."""
    with releases.connect("postgres") as administrator:
        administrator.execute("create database bare")
    with releases.connect("bare") as connection:
        connection.execute("create schema vectors; create extension vector schema vectors; create extension plpython3u")
    with releases.connect("postgres") as administrator:
        administrator.execute("create database present template bare")
    with releases.connect("bare") as connection:
        yield connection


@pytest.fixture(scope="module")
def present(releases: Releases, bare: Connection) -> Iterator[Connection]:
    """The same with the present release."""
    with releases.connect("present") as connection:
        connection.execute(f"create extension pg_autoembed version '{VERSION}'")
        yield connection


def installed(bare: Connection, *versions: str, schema: str = "public") -> Snapshot:
    """Of an installation of the first version that was updated to the others."""
    with bare.transaction(force_rollback=True):
        bare.execute(f"create schema if not exists {schema}")
        bare.execute(f"create extension pg_autoembed schema {schema} version '{versions[0]}'")
        for version in versions[1:]:
            update(bare, version)
        return snapshot(bare)


@pytest.fixture(scope="module")
def fresh(bare: Connection) -> Snapshot:
    return installed(bare, NEXT)


def test_health_tells_of_the_update_that_is_due(db: Connection) -> None:
    extension = "select status, hint from embedding_health where check_name = 'extension'"
    assert rows(db, extension) == [("warn", "ALTER EXTENSION pg_autoembed UPDATE")]
    db.execute("alter extension pg_autoembed update")
    assert rows(db, extension) == [("ok", None)]


# --- the same as a fresh install -----------------------------------------------------------------------------------


def earlier_releases() -> list[str]:
    """Whose install scripts are on this machine beside the present one's."""
    scripts = (pg_config("--sharedir") / "extension").glob("pg_autoembed--*.sql")
    versions = [path.stem.removeprefix("pg_autoembed--") for path in scripts]
    return sorted(version for version in versions if "--" not in version and version != VERSION)


UPDATES = [(VERSION, NEXT), (VERSION, LATER), *((earlier, VERSION) for earlier in earlier_releases())]


@pytest.mark.parametrize(("former", "version"), UPDATES)
def test_updated_equals_fresh(bare: Connection, former: str, version: str) -> None:
    expected = installed(bare, version)
    assert installed(bare, former) != expected
    assert installed(bare, former, version) == expected


def test_snapshot_sees_every_change(present: Connection, bare: Connection, fresh: Snapshot) -> None:
    touched = {name for made in CHANGES.values() for name in made.touched}
    assert touched <= set(differences(snapshot(present), fresh))
    touched = {name for made in LATER_CHANGES.values() for name in made.touched}
    assert touched <= set(differences(fresh, installed(bare, LATER)))


def test_snapshot_knows_no_place(bare: Connection) -> None:
    """Two installations differ by nothing but their schema's name, however odd."""
    one, other = (installed(bare, VERSION, schema=schema) for schema in ("ai", '"Odd one"'))
    assert len(one) > 200
    assert differences(one, other) == []


@pytest.fixture
def script(releases: Releases) -> Iterator[Path]:
    """The installed upgrade script, for a test to spoil."""
    installed = pg_config("--sharedir") / "extension" / f"pg_autoembed--{VERSION}--{NEXT}.sql"
    sound = installed.read_text()
    yield installed
    installed.write_text(sound)


def spoil(script: Path, name: str, former: str, new: str) -> None:
    """Changes the statement of that name."""
    statements = script.read_text().split(STATEMENT)
    place = 1 + list(CHANGES).index(name)
    assert former in statements[place]
    statements[place] = statements[place].replace(former, new)
    script.write_text(STATEMENT.join(statements))


def updated(present: Connection) -> Snapshot:
    with present.transaction(force_rollback=True):
        update(present, NEXT)
        return snapshot(present)


@pytest.mark.parametrize("forgotten", FORGETTABLE)
def test_forgotten_statement_is_found(script: Path, present: Connection, fresh: Snapshot, forgotten: str) -> None:
    whole = script.read_text().split(STATEMENT)[1 + list(CHANGES).index(forgotten)]
    spoil(script, forgotten, whole, "")
    assert differences(updated(present), fresh) == sorted(CHANGES[forgotten].touched)


CARELESS = {
    "view without its option": ("view", " with (security_invoker = true)", ""),
    "event trigger not in replicas": ("event trigger", "; alter event trigger autoembed_on_ddl enable always", ""),
    "function with another cost": ("function", "language sql volatile", "language sql volatile cost 7"),
    "column with a default": ("column", "device text", "device text default 'cpu'"),
    "policy for one command": ("policy", "autoembed.note using", "autoembed.note for select using"),
    "part of the grant": ("grant on the table", "(registration), insert", "(registration)"),
}


@pytest.mark.parametrize("case", CARELESS)
def test_careless_statement_is_found(script: Path, present: Connection, fresh: Snapshot, case: str) -> None:
    name, former, new = CARELESS[case]
    spoil(script, name, former, new)
    assert differences(updated(present), fresh) == sorted(CHANGES[name].touched)


# --- what lives on -------------------------------------------------------------------------------------------------

STATE = ("registration", "run", "failure", "truncation", "frontier", "suspect", "inflight", "inflight_twin")
TABLES = ("knowledge", "quick", "paused")
EVERYTHING = {
    "vectors": "select id, embedding::text from {table} order by id",
    "triggers": "select oid, tgenabled, pg_get_triggerdef(oid) from pg_trigger where tgrelid = '{table}'::regclass",
    "indexes": "select indexrelid, pg_get_indexdef(indexrelid) from pg_index where indrelid = '{table}'::regclass",
}
GRANTED = "select has_function_privilege('pg_monitor', 'embed(text, text, text)', 'execute')"


def state(connection: Connection) -> dict[str, Any]:
    """State rows in the columns that the present release has, and all that a declaration means for its table."""
    queries = {name: f"select to_jsonb(x) - 'device' from autoembed.{name} x" for name in STATE}
    for table in TABLES:
        queries |= {f"{what} of {table}": each.format(table=table) for what, each in EVERYTHING.items()}
    found = {name: sorted(rows(connection, each), key=str) for name, each in queries.items()}
    return found | {"granted": scalar(connection, GRANTED)}


@pytest.fixture
def lived_in(db: Connection) -> Connection:
    """Columns that are deferred, immediate and paused; vectors, a failure, a truncation, a suspect, pending rows."""
    for table in TABLES:
        db.execute(f"create table {table} (id int primary key, content text, embedding vector(384))")
    db.execute("select embed_column('knowledge', 'content'), embed_column('paused', 'content')")
    db.execute("select embed_column('quick', 'content', mode => 'immediate')")
    db.execute("select embed_column_set('paused', 'embedding', enabled => false)")
    db.execute("grant execute on function embed(text, text, text) to pg_monitor")
    db.execute("insert into quick values (1, 'at once')")
    db.execute("insert into paused values (1, 'not now')")
    long = " ".join(["word"] * 100)
    db.execute("insert into knowledge values (1, 'one'), (2, 'two'), (3, 'raiseword'), (4, %s)", [long])
    assert fill(db, relation="knowledge") == (3, 1, 0)
    db.execute("insert into knowledge values (5, 'five'), (6, 'six')")
    return db


PACKAGE = """create function package() returns text language plpython3u as
    'import sys; return sys.modules["autoembed"].__file__'"""


def package(connection: Connection) -> str:
    """The version of the site that the session's package comes from."""
    assert scalar(connection, "select embed('any', 'stub-384') is not null")
    return Path(scalar(connection, "select package()")).parts[-6]


def test_state_lives_on(releases: Releases, lived_in: Connection) -> None:
    """In the middle of a fill, too, which ends as if nothing had happened."""
    lived_in.execute(PACKAGE)
    with releases.connect(lived_in.info.dbname) as other:
        with releases.rig.encoding(lived_in, relation="knowledge") as filling:
            before = state(other)
            assert all(before[name] for name in ("registration", "run", "failure", "truncation", "inflight"))
            update(other, NEXT)
            assert state(other) == before
        assert filling.result == (2, 0, 0)
        assert leftovers(other) == {"failures": 1}
        assert package(lived_in) == VERSION
        assert package(other) == NEXT
        goes_on(other)


def goes_on(connection: Connection) -> None:
    """Failures, triggers in both modes, the pause, views, event triggers and the end, under the next release."""
    failures = rows(connection, "select key, kind, attempts, checked is not null from embedding_failures")
    assert failures == [({"id": 3}, "encoder", 1, True)]
    connection.execute("update knowledge set content = 'three' where id = 3")
    connection.execute("update knowledge set content = 'another' where id = 1")
    assert rows(connection, "select id from knowledge where embedding is null order by 1") == [(1,), (3,)]
    assert fill(connection) == (2, 0, 0)
    assert leftovers(connection) == {}
    connection.execute("insert into quick values (2, 'at once, too')")
    connection.execute("insert into paused values (2, 'not now')")
    assert (pending(connection, "quick"), pending(connection, "paused")) == (0, 2)
    connection.execute("alter table knowledge rename content to body")
    listed = "select source::text[], status from embedding_columns where relation = 'knowledge'::regclass"
    assert rows(connection, listed) == [(["body"], "ready")]
    assert scalar(connection, "select count(*) from embed_search('knowledge', 'another', 3)") == 3
    assert scalar(connection, "select embed_release()") == "next"
    connection.execute("drop extension pg_autoembed")
    assert rows(connection, "select tgname from pg_trigger where not tgisinternal") == []
    assert scalar(connection, "select to_regnamespace('autoembed')") is None


def test_session_with_another_interface_is_told(releases: Releases, lived_in: Connection) -> None:
    """What it asks of a model is refused; what it writes is not, and waits for a session that can."""
    with releases.connect(lived_in.info.dbname) as other:
        with releases.rig.encoding(lived_in, relation="knowledge") as filling:
            update(other, LATER)
        with pytest.raises(psycopg.errors.InvalidTextRepresentation):  # its shape is the former release's
            filling.result  # noqa: B018
        assert leftovers(other) == {"failures": 1}
        for asked in ("select embed('x', 'stub-384')", "call embed_pending()"):
            error = refusal(lived_in, asked)
            assert error.sqlstate == "55000"
            assert "SQL speaks version 2 and the Python package version 1" in str(error.diag.message_primary)
            assert "reconnect" in str(error.diag.message_hint)
        with notices(lived_in) as heard:
            lived_in.execute("insert into quick values (2, 'cannot be at once')")
        assert [notice.severity for notice in heard] == ["WARNING"]
        lived_in.execute("update knowledge set content = 'another' where id = 1")
        fill(other)
        assert rows(other, "select id from knowledge where embedding is null") == [(3,)]
        assert pending(other, "quick") == 0
