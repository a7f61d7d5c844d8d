"""The server under measurement: a schema of the benchmarks' own, and fair conditions before each measurement."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import psycopg
from psycopg import sql

SCHEMA = "autoembed_bench"


class BenchError(Exception):
    """What stops a benchmark, in words for its user."""


def connect() -> psycopg.Connection:
    """Notices are left out; autocommit, as `call embed_pending` needs it."""
    if not os.environ.get("AUTOEMBED_DSN"):
        raise BenchError("AUTOEMBED_DSN is not set: `make bench` sets it")
    connection = psycopg.connect(os.environ["AUTOEMBED_DSN"], autocommit=True, options="-c client_min_messages=warning")
    run(connection, "create extension if not exists pg_autoembed cascade")
    run(connection, f"create schema if not exists {SCHEMA}")
    return connection


def run(connection: psycopg.Connection, statement: str, *arguments: object) -> psycopg.Cursor:
    return connection.execute(statement.encode(), arguments or None)


def value(connection: psycopg.Connection, query: str, *arguments: object) -> Any:
    row = run(connection, query, *arguments).fetchone()
    return row[0] if row else None


def copy_rows(connection: psycopg.Connection, target: str, rows: Sequence[Sequence[object]]) -> None:
    with connection.cursor() as cursor, cursor.copy(f"copy {target} from stdin".encode()) as copy:
        for row in rows:
            copy.write_row(row)


def settle(connection: psycopg.Connection, *tables: str) -> None:
    """No dead rows, current statistics, nothing left to write: what one measurement leaves must not burden the next."""
    for table in tables:
        run(connection, f"vacuum (analyze) {table}")
    with suppress(psycopg.errors.InsufficientPrivilege):
        run(connection, "checkpoint")


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def server_seconds(connection: psycopg.Connection, action: Callable[[], object]) -> float:
    """Processor seconds of the connection's backend: what waits and other processes do to the clock is not in them."""
    schedule = Path(f"/proc/{connection.info.backend_pid}/schedstat")

    def used() -> int:
        return int(schedule.read_text().split()[0])  # nanoseconds

    before = used()
    action()
    return (used() - before) / 1e9


def interleaved(measures: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """A B, B A, A B, …: what drifts on the machine meets each of them alike."""
    results: dict[str, list[float]] = {name: [] for name in measures}
    for number in range(rounds):
        for name in list(measures)[:: -1 if number % 2 else 1]:
            results[name].append(measures[name]())
    return results


def ratio(results: Mapping[str, Sequence[float]], name: str, reference: str) -> float:
    return median(results[name]) / median(results[reference])


def versions(connection: psycopg.Connection) -> str:
    server = value(connection, "select split_part(version(), ' on ', 1)")
    extensions = run(
        connection,
        "select extname || ' ' || extversion from pg_extension where extname in ('vector', 'pg_autoembed') order by 1",
    )
    return ", ".join([server, *(row[0].replace("vector", "pgvector") for row in extensions)])


def model_dimensions(connection: psycopg.Connection, model: str) -> int:
    found = value(connection, "select dimensions from embedding_models where name = %s and status = 'ready'", model)
    if not found:
        raise BenchError(f"the server has no model {model}: autoembed model add PATH")
    return int(found)


def quoted(connection: psycopg.Connection, text: str) -> str:
    return sql.Literal(text).as_string(connection)
