"""Talking to a server in tests: one value, one column, the error or the notices that a statement must bring."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest
from psycopg import sql

from .server import Connection

TINY = "tiny-mpnet"
SIZE = 32
VECTOR = "array_fill(%s::real, array[32])::vector"
"""A vector of the tiny model's dimensions, each of them the argument."""

DECLARING = (
    "embed_column(regclass, name, name, text, text, boolean, text, boolean, boolean, name, text), "
    "embed_column(regclass, name[], name, text, text, boolean, text, boolean, boolean, name, text)"
)
"""Both forms of embed_column, as GRANT wants them."""


def scalar(connection: Connection, statement: str, arguments: Sequence[Any] = ()) -> Any:
    """The one value of a statement's one row."""
    row = connection.execute(statement, arguments or None).fetchone()
    assert row is not None
    return row[0]


def column(connection: Connection, statement: str, arguments: Sequence[Any] = ()) -> list[Any]:
    """The first value of each row."""
    return [row[0] for row in connection.execute(statement, arguments or None)]


def refusal(connection: Connection, statement: str, arguments: Sequence[Any] = ()) -> psycopg.Error:
    """The error that a statement must end with."""
    with pytest.raises(psycopg.Error) as caught:
        connection.execute(statement, arguments or None)
    return caught.value


@dataclass(frozen=True)
class Notice:
    severity: str | None
    message: str | None
    hint: str | None
    sqlstate: str | None


@contextmanager
def notices(connection: Connection) -> Iterator[list[Notice]]:
    """What the server says meanwhile."""
    heard: list[Notice] = []

    def hear(said: psycopg.errors.Diagnostic) -> None:
        heard.append(Notice(said.severity_nonlocalized, said.message_primary, said.message_hint, said.sqlstate))

    connection.add_notice_handler(hear)
    yield heard
    connection.remove_notice_handler(hear)


@contextmanager
def acting_as(connection: Connection, role: str) -> Iterator[Connection]:
    """As in a session of the role's own, and back."""
    connection.execute(sql.SQL("set session authorization {}").format(sql.Identifier(role)))
    yield connection
    connection.execute("reset session authorization")
