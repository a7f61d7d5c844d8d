"""The documents keep their word: what they show runs, what they name exists, and what they link to is there."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import median

import pytest
from bench.main import arguments
from psycopg.conninfo import make_conninfo

from autoembed.command import cli
from autoembed.settings import VARIABLES
from support.documents import PAGES, ROOT, commands, outputs, read_page, script, statements
from support.server import Connection, Server, pg_config, site
from support.talk import column

BEFORE = {
    "docs/words.md": """
        create table article (id bigint generated always as identity primary key, body text, embedding vector(384));
        insert into article (body) values ('A row.');
    """,
}
"""What a page's reader has done before, where the page does not say it."""
INSTEAD = {
    "call embed_worker()": "call embed_worker(max_seconds => 0)",
    "call embed_wait('article', '5 minutes')": "select embed_column_set('article', 'embedding', enabled => true);"
    "call embed_pending(); call embed_wait('article', '5 minutes')",
}
"""Statements that would run for an hour, or wait for what nobody does here."""
FOREIGN = {
    *("apt-get", "cd", "docker", "git", "head", "podman", "psql", "update-alternatives"),
    "autoembed-health",  # of the image, whose tests call it
}
"""Commands that are not the product's."""
CHEAP = {"autoembed model list", "autoembed model verify", "autoembed --version", "autoembed doctor", "make help"}
"""Commands that are run as they stand."""
LANGUAGES = {"sql", "sh", "ini", "python", "text"}
FOLDERS = ("bench/", "container/", "demo/", "docs/", "plpython/", "preload/", "scripts/", "sql/", "tests/")


@pytest.fixture(scope="module")
def reading(server_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server as the documents' reader has it, with preload and pg_cron."""
    settings: dict[str, object] = {
        "shared_preload_libraries": "autoembed_preload,pg_cron",
        "cron.database_name": "autoembed",
        "cron.use_background_workers": "on",
        "max_worker_processes": 20,
    }
    environment = server_environment | {"EMBEDDING_PRELOAD": "all-MiniLM-L6-v2"}
    own = Server(tmp_path_factory.mktemp("reading") / "server", environment, settings)
    own.create()
    yield own
    own.destroy()


@pytest.fixture
def place(request: pytest.FixtureRequest, reading: Server) -> Iterator[tuple[str, str]]:
    """The page's own schema, or its own database where it creates the extension; and its roles go with it."""
    page = read_page(request.getfixturevalue("name"))
    schema = re.sub(r"\W", "_", page.name.lower())
    own = "create extension pg_autoembed" in script(page)
    dbname = schema if own else "autoembed"
    with reading.connect("postgres") as administrator:
        if own:
            administrator.execute(f"create database {dbname}")
        before = set(column(administrator, "select rolname from pg_roles"))
    with reading.connect(dbname) as connection:
        connection.execute(f"create schema {schema}")
    yield dbname, schema
    with reading.connect(dbname) as connection:
        clear(connection, schema, before)
    if own:
        with reading.connect("postgres") as administrator:
            administrator.execute(f"drop database {dbname} with (force)")


def clear(connection: Connection, schema: str, before: set[str]) -> None:
    connection.execute(f"drop schema {schema} cascade")
    for role in set(column(connection, "select rolname from pg_roles")) - before:
        connection.execute(f'drop owned by "{role}" cascade')
        connection.execute(f'drop role "{role}"')


def psql(server: Server, place: tuple[str, str], statements: str, tmp_path: Path, name: str) -> str:
    """What psql prints for the statements; it stops at an error, and says at which line."""
    file = tmp_path / Path(name).name
    file.write_text(statements, encoding="utf-8")
    dbname, schema = place
    command = [str(pg_config("--bindir") / "psql"), "-X", "-q", "-v", "ON_ERROR_STOP=1", "-f", str(file)]
    environment = {**os.environ, "PGOPTIONS": f"-c search_path={schema},public -c statement_timeout=60s"}
    done = subprocess.run([*command, server.dsn(dbname)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", [name for name in PAGES if read_page(name).of("sql")])
def test_sql_runs_as_it_stands(reading: Server, place: tuple[str, str], tmp_path: Path, name: str) -> None:
    page = read_page(name)
    said = outputs(psql(reading, place, script(page), tmp_path, name))
    assert said.keys() == {block.line for block in page.of("sql") if block.not_run is None}
    former = None
    for block in page.blocks:
        if block.raises:
            assert said[block.line].splitlines()[-1] == block.raises, f"{name}:{block.line}"
        if block.said == "output":
            assert former, f"{name}:{block.line} is the output of nothing"
            assert said[former.line].endswith(block.text), f"{name}:{block.line} shows another output than there is"
        former = block if block.language == "sql" else former


@pytest.mark.parametrize("name", [name for name in PAGES if read_page(name).of("python")])
def test_python_runs_as_it_stands(reading: Server, place: tuple[str, str], tmp_path: Path, name: str) -> None:
    """After the page's statements, its blocks in order."""
    page = read_page(name)
    psql(reading, place, script(page), tmp_path, name)
    dbname, schema = place
    names = {"dsn": make_conninfo(reading.dsn(dbname), options=f"-csearch_path={schema},public")}
    for block in page.of("python"):
        code = compile("\n" * (block.line - 1) + block.text, name, "exec")
        if block.not_run is None:
            exec(code, names)


@pytest.mark.parametrize("name", ["docs/words.md"])
def test_statements_within_the_prose_run(reading: Server, place: tuple[str, str], tmp_path: Path, name: str) -> None:
    found = [f"{INSTEAD.get(statement, statement)};" for _, statement in statements(read_page(name))]
    assert len(found) >= 20
    psql(reading, place, "\n".join([BEFORE[name], *found]), tmp_path, name)


@pytest.mark.parametrize("name", PAGES)
def test_blocks_say_what_they_are(name: str) -> None:
    for block in read_page(name).blocks:
        assert block.language in LANGUAGES, f"{name}:{block.line} is a block of language {block.language!r}"
        assert block.not_run is None or len(block.not_run) > 10, f"{name}:{block.line} gives no reason"


@pytest.mark.parametrize("name", PAGES)
def test_commands_exist(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in read_page(name).of("sh"):
        for number, words in commands(block):
            check_command(f"{name}:{number}", words, monkeypatch)


def check_command(where: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    program = words[0]
    if program in ("docker", "podman") and words[1] == "exec" and "autoembed" in words:
        check_command(where, words[words.index("autoembed") :], monkeypatch)
    elif program == "make":
        check_make(where, words, monkeypatch)
    elif program == "autoembed":
        if words[1:] != ["--version"]:
            cli._parser().parse_args(words[1:])
    elif program not in FOREIGN:
        assert os.access(ROOT / program, os.X_OK), f"{where} names {program}, which is no command here"


def check_make(where: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The target exists, and the variables mean something to it."""
    done = subprocess.run([*words, "-n"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{where}: {done.stderr}"
    readers = [ROOT / "Makefile", *(ROOT / "scripts").glob("*.sh"), *(ROOT / "demo").glob("*.py")]
    known = "".join(each.read_text(encoding="utf-8") for each in readers)
    for variable, value in (word.split("=", 1) for word in words[1:] if "=" in word):
        assert re.search(rf"\b{variable}\b", known), f"{where} sets {variable}, which nothing reads"
        if variable == "BENCH":
            check_bench(value, monkeypatch)
        if variable == "PYTEST_ARGS":
            check_tests(where, value)


def check_bench(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench/run", *choice.split()])
    arguments()


def check_tests(where: str, choice: str) -> None:
    for word in choice.split():
        file, _, test = word.partition("::")
        if file.startswith("tests/"):
            assert (ROOT / file).exists(), f"{where} names {file}, which is not there"
            assert not test or test in names_in(ROOT / file), f"{where}: {file} has no {test}"


def test_figures_stand_beside_the_command_that_makes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    text = read_page("docs/performance.md").text
    choices = re.findall(r'BENCH="([^"]+)"', text) + re.findall(r'\| `"?([a-z][^`"]*)"?` \|$', text, re.MULTILINE)
    assert len(choices) > 15
    for choice in choices:
        check_bench(choice, monkeypatch)


def test_cheap_commands_run(model_dir: Path) -> None:
    shown = {" ".join(words) for name in PAGES for block in read_page(name).of("sh") for _, words in commands(block)}
    python = [str(site() / "bin" / "python"), "-I", "-m"]
    for line in CHEAP & shown:
        words = line.split()
        done = subprocess.run(
            words if words[0] == "make" else [*python, *words],
            cwd=ROOT,
            env={**os.environ, "EMBEDDING_MODEL_DIR": str(model_dir)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout, f"{line}: {done.stderr}"
        assert done.returncode == 0 or line == "autoembed doctor", f"{line}: {done.stderr}"


def test_settings_exist(reading: Server) -> None:
    with reading.connect() as connection:
        known = {*column(connection, "select name from pg_settings"), *(variable.name for variable in VARIABLES)}
    for name in PAGES:
        for block in read_page(name).of("ini"):
            for line in block.lines:
                assert line.split("=")[0].strip() in known, f"{name}:{block.line} names a setting that is none"


# --- links and names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    page = read_page(name)
    for number, target in page.links():
        if re.match(r"https?:", target):
            continue
        file, _, anchor = target.partition("#")
        found = (page.path.parent / file).resolve() if file else page.path
        assert found.exists(), f"{name}:{number} links to {file}, which is not there"
        if anchor:
            known = read_page(str(found.relative_to(ROOT))).anchors()
            assert anchor in known, f"{name}:{number} links to #{anchor}, which is no heading of {found.name}"


@pytest.mark.parametrize("name", [name for name in PAGES if "\n- [" in read_page(name).text.split("\n## ")[0]])
def test_contents_are_the_headings(name: str) -> None:
    before, *sections = read_page(name).text.split("\n## ")
    listed = re.findall(r"^- \[(.*)\]\(#", before, re.MULTILINE)
    assert listed == [section.splitlines()[0] for section in sections]


def test_each_page_is_linked_from_the_readme() -> None:
    linked = {target.partition("#")[0] for _, target in read_page("README.md").links()}
    assert set(PAGES) - {"README.md"} <= linked


@pytest.mark.parametrize("name", PAGES)
def test_files_and_tests_that_are_named_exist(name: str) -> None:
    everywhere = set().union(*(names_in(file) for file in (ROOT / "tests").rglob("test_*.py")))
    for number, piece in read_page(name).code():
        if re.fullmatch(r"test_\w+", piece):
            assert piece in everywhere, f"{name}:{number} names {piece}, and there is no such test"
        elif piece.startswith(FOLDERS) and not re.search(r"[ *\u2026A-Z]", piece):
            assert (ROOT / piece).exists(), f"{name}:{number} names {piece}, which is not there"


@cache
def names_in(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_the_readme_is_short_and_airy() -> None:
    lines = read_page("README.md").text.splitlines()
    assert len(lines) <= 150
    assert median(len(line) for line in lines if line) < 80


# --- the reference is whole ----------------------------------------------------------------------------------------

MEMBERS = """
    select p.proname from pg_proc p join pg_depend d on d.classid = 'pg_proc'::regclass and d.objid = p.oid
        and d.deptype = 'e'
    join pg_extension e on e.oid = d.refobjid and e.extname = 'pg_autoembed'
    where p.pronamespace <> 'autoembed'::regnamespace
    union
    select unnest(p.proargnames) from pg_proc p join pg_depend d on d.classid = 'pg_proc'::regclass and d.objid = p.oid
        and d.deptype = 'e'
    join pg_extension e on e.oid = d.refobjid and e.extname = 'pg_autoembed'
    where p.pronamespace <> 'autoembed'::regnamespace
    union
    select c.relname from pg_class c where c.relname like 'embedding\\_%' and c.relkind = 'v'
    union
    select a.attname from pg_class c join pg_attribute a on a.attrelid = c.oid and a.attnum > 0
    where c.relname like 'embedding\\_%' and c.relkind = 'v'
"""
"""Functions with their arguments, and views with their columns."""


def test_reference_names_all_that_there_is(reading: Server) -> None:
    with reading.connect() as connection:
        names = set(column(connection, MEMBERS)) | {variable.name for variable in VARIABLES}
    words = {word for _, piece in read_page("docs/reference.md").code() for word in re.findall(r"\w+", piece)}
    assert names - words == set()


SIGNATURES = """
    select p.proname, pg_get_function_arguments(p.oid) from pg_proc p
    join pg_depend d on d.classid = 'pg_proc'::regclass and d.objid = p.oid and d.deptype = 'e'
    join pg_extension e on e.oid = d.refobjid and e.extname = 'pg_autoembed'
    where p.pronamespace <> 'autoembed'::regnamespace
"""
SIGNATURE = re.compile(r"(?:call )?(\w+)\(([^)]*)\)")
UNSAID = {None, "NULL", "0"}
"""Defaults that the reference does not repeat: none, null, and the zeros of INOUT arguments."""


def in_sql(argument: str) -> tuple[str, str | None]:
    declaration, _, default = argument.partition(" DEFAULT ")
    return re.sub(r"^(IN|INOUT) ", "", declaration).split()[0], default.split("::")[0] or None


def in_reference(argument: str) -> tuple[str, str | None]:
    declaration, _, default = argument.partition(" = ")
    return declaration.split()[0], default or None


def test_reference_has_the_arguments_that_there_are(reading: Server) -> None:
    """In their order, with their defaults."""
    shown: dict[str, set[tuple[tuple[str, str | None], ...]]] = {}
    for _, piece in read_page("docs/reference.md").code():
        if found := SIGNATURE.match(piece):
            listed = tuple(in_reference(each) for each in found[2].split(", ") if each)
            shown.setdefault(found[1], set()).add(listed)
    with reading.connect() as connection:
        signatures = connection.execute(SIGNATURES).fetchall()
    for name, declared in signatures:
        there = [in_sql(each) for each in declared.split(", ") if each and not each.startswith("OUT ")]
        said = tuple((argument, None if default in UNSAID else default) for argument, default in there)
        assert said in shown[name], f"the reference has {name} otherwise than {said}"


def test_troubleshooting_lists_the_sqlstates_that_it_speaks_of() -> None:
    text = read_page("docs/troubleshooting.md").text
    table, _, questions = text.partition("\n## ")
    spoken = set(re.findall(r"SQLSTATE (\w{5})", questions)) | set(re.findall(r"<!-- raises (\w{5}) -->", questions))
    listed = set(re.findall(r"\b[0-9A-Z]{5}\b", table)) - {"SQLSTATE"}
    assert spoken - listed == set()
