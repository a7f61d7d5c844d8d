"""A session with a loaded model for many tests: loading takes seconds. Each test has a schema of its own in it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
from psycopg import sql

from models_for_tests import tiny_mpnet

from .server import Connection, Server, add_model
from .talk import TINY, scalar

SCHEMAS = count(1)
NUMBERS = count(1)


@pytest.fixture(scope="session")
def tiny(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of 32 dimensions, with prompts; in the shared server's model directory."""
    add_model(model_dir, tiny_mpnet(tmp_path_factory.mktemp("tiny"), TINY), TINY)
    return TINY


@pytest.fixture
def fragile(tiny: str, model_dir: Path) -> Iterator[Path]:
    """The folder of a model of a test's own, to be broken or removed."""
    # a name of its own: a warm session keeps what it has loaded, whatever becomes of the folder
    folder = Path(shutil.copytree(model_dir / tiny, model_dir / f"fragile{next(NUMBERS)}"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def warm_session(server: Server, tiny: str) -> Iterator[Connection]:
    with server.connect("postgres") as administrator:
        administrator.execute("create database warm template autoembed")
    with server.connect("warm") as connection:
        connection.execute("select embed('warm', %s)", [tiny])
        yield connection
    with server.connect("postgres") as administrator:
        administrator.execute("drop database warm with (force)")


@pytest.fixture
def warm(warm_session: Connection) -> Iterator[Connection]:
    """The warm session of a superuser, in a schema of the test's own."""
    schema = sql.Identifier(f"s{next(SCHEMAS)}")
    warm_session.execute(sql.SQL("create schema {}").format(schema))
    warm_session.execute(sql.SQL("set search_path = {}, public").format(schema))
    warm_session.execute("set statement_timeout = '60s'")
    yield warm_session
    warm_session.rollback()
    for statement in ("reset role", "reset session authorization", "reset all", "drop schema {} cascade"):
        warm_session.execute(sql.SQL(statement).format(schema))


@pytest.fixture
def warm_role(warm: Connection) -> Iterator[Callable[..., str]]:
    """warm_role("alice"): a role that may use and create in the test's schema; gone after the test."""
    made: list[sql.Identifier] = []

    def make(name: str, options: str = "") -> str:
        made.append(sql.Identifier(name))
        warm.execute(sql.SQL("create role {} login {}").format(made[-1], sql.SQL(options)))
        schema = sql.Identifier(scalar(warm, "select current_schema()"))
        warm.execute(sql.SQL("grant all on schema {} to {}").format(schema, made[-1]))
        return name

    yield make
    warm.rollback()
    warm.execute("reset session authorization")
    for name in made:
        warm.execute(sql.SQL("drop owned by {} cascade").format(name))
        warm.execute(sql.SQL("drop role {}").format(name))
