"""Fixtures: one shared server a session, a fresh database a test, servers of their own for tests that crash one."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import coverage
import pytest
from psycopg import sql

from models_for_tests import packaged_minilm
from support.server import DATABASE, Connection, Server, add_model

collect_ignore = ["image"]  # `make image-test` runs them, as whoever may start containers
SUPPORT = Path(__file__).parent / "support"
NUMBERS = count(1)
TEXTS = (
    "A transaction either happens completely or not at all.",
    "Vacuum gives back the room that dead rows take.",
    "The planner estimates what each way to run a query costs.",
    "A partial index covers only the rows that its condition selects.",
    "Write-ahead logging makes a crash survivable.",
)


def pytest_configure(config: pytest.Config) -> None:
    if os.geteuid() == 0:
        pytest.exit("PostgreSQL does not run as root: use 'make test', which drops to another user", returncode=4)
    # what libpq and the product read: PGHOST and PGTZ, but not PG_CONFIG
    for name in [name for name in os.environ if name.startswith("EMBEDDING_") or re.match("PG[A-Z]", name)]:
        del os.environ[name]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with the real all-MiniLM-L6-v2 (384 dimensions)."""
    directory = tmp_path_factory.mktemp("models")
    add_model(directory, packaged_minilm(), "all-MiniLM-L6-v2")
    return directory


@pytest.fixture(scope="session")
def backend_coverage(pytestconfig: pytest.Config) -> dict[str, str]:
    """The environment that makes backends measure coverage; empty when pytest does not."""
    if not pytestconfig.pluginmanager.hasplugin("_cov") or not pytestconfig.getoption("cov_source", None):
        return {}
    data_file = os.environ.get("COVERAGE_FILE", pytestconfig.rootpath / ".coverage")
    return {
        "PYTHONPATH": str(SUPPORT / "backend"),
        "AUTOEMBED_TEST_TOOLS": str(Path(coverage.__file__).parents[1]),
        "COVERAGE_PROCESS_START": str(SUPPORT / "coverage.ini"),
        "COVERAGE_FILE": str(data_file),
    }


@pytest.fixture(scope="session")
def server_environment(model_dir: Path, backend_coverage: dict[str, str]) -> dict[str, str]:
    return {
        "EMBEDDING_MODEL_DIR": str(model_dir),
        "EMBEDDING_MODEL_NAME": "all-MiniLM-L6-v2",
        "EMBEDDING_THREADS": "1",  # several backends encode at once, beside the tests' own oracle
        **backend_coverage,
    }


@pytest.fixture(scope="session")
def server(server_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The shared server. Do not stop or configure it: make_server is for that."""
    shared = Server(tmp_path_factory.mktemp("server") / "shared", server_environment, {"max_connections": 50})
    shared.create()
    yield shared
    shared.destroy()


@pytest.fixture
def make_server(server_environment: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """make_server(settings={...}, EMBEDDING_X="...") starts a server of the test's own, durable and free to crash."""
    made: list[Server] = []

    def make(settings: dict[str, object] | None = None, **environment: str) -> Server:
        options = {"fsync": "on", "restart_after_crash": "on", **(settings or {})}
        own = Server(tmp_path / f"server{len(made)}", server_environment | environment, options)
        made.append(own)
        own.create()
        return own

    yield make
    for own in made:
        own.destroy()


@dataclass
class Database:
    """A test's own database and the roles made for it."""

    server: Server
    name: str
    roles: list[str] = field(default_factory=list)

    def create(self) -> None:
        self._administer(sql.SQL("create database {} template {}"), self.name, DATABASE)

    def drop(self) -> None:
        self._administer(sql.SQL("drop database {} with (force)"), self.name)
        for role in self.roles:
            self._administer(sql.SQL("drop role {}"), role)

    def _administer(self, statement: sql.SQL, *names: str) -> None:
        with self.server.connect("postgres") as connection:
            connection.execute(statement.format(*map(sql.Identifier, names)))


@pytest.fixture
def database(server: Server) -> Iterator[Database]:
    own = Database(server, f"test{next(NUMBERS)}")
    own.create()
    yield own
    own.drop()


@pytest.fixture
def connect(database: Database) -> Iterator[Callable[..., Connection]]:
    """connect(role="postgres", dbname=<the test's>, autocommit=True): one more connection, closed after the test."""
    opened: list[Connection] = []

    def open_one(role: str = "postgres", dbname: str | None = None, *, autocommit: bool = True) -> Connection:
        opened.append(database.server.connect(dbname or database.name, role, autocommit=autocommit))
        return opened[-1]

    yield open_one
    for connection in opened:
        connection.close()


@pytest.fixture
def db(connect: Callable[..., Connection]) -> Connection:
    """A superuser's connection to the test's own database, autocommit."""
    return connect()


@pytest.fixture
def role(db: Connection, database: Database) -> Callable[..., str]:
    """role("alice", options="createdb"): a login role with a schema of its own name; gone after the test."""

    def make(name: str, options: str = "") -> str:
        db.execute(sql.SQL("create role {} login {}").format(sql.Identifier(name), sql.SQL(options)))
        database.roles.append(name)
        db.execute(sql.SQL("create schema authorization {}").format(sql.Identifier(name)))
        return name

    return make


@pytest.fixture
def knowledge(db: Connection) -> Callable[..., str]:
    """knowledge(rows=5, texts=(), relation="knowledge", dimensions=384): a table (id, content, embedding)."""

    def make(rows: int = 5, texts: Sequence[str] = (), relation: str = "knowledge", dimensions: int = 384) -> str:
        table = sql.Identifier(relation)
        columns = sql.SQL("id bigint generated always as identity primary key, content text, embedding vector")
        db.execute(sql.SQL("create table {} ({}({}))").format(table, columns, sql.SQL(str(dimensions))))
        contents = list(texts) or [f"{TEXTS[n % len(TEXTS)]} ({n})" for n in range(rows)]
        db.execute(sql.SQL("insert into {} (content) select unnest(%s::text[])").format(table), [contents])
        return relation

    return make
