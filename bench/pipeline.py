"""`call embed_pending(32)` against the plain pipeline: fetch 32, encode, 32 updates, commit, in a psycopg script.

Both fill tables of the same layout, with the same indexes and rows, with a model that is loaded already.
"""

import os
import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import psycopg
from demo.chunker import Chunk
from pgvector.psycopg import register_vector

from bench.corpus import create, fill, sample
from bench.database import (
    BenchError,
    connect,
    interleaved,
    model_dimensions,
    quoted,
    run,
    seconds,
    settle,
    value,
    versions,
)
from bench.reference import sentence_transformer
from bench.report import Table, machine, packages

BATCH = 32
CALL, SCRIPT = "call embed_pending(32)", "psycopg and SentenceTransformer.encode(batch_size=32)"
DEFAULT_MODELS = "/var/lib/pg_autoembed/models"


class Pipeline:
    """The script that one writes without the extension."""

    def __init__(self, connection: psycopg.Connection, table: str, model: str) -> None:
        register_vector(connection)
        self.connection, self.table = connection, table
        folder = Path(os.environ.get("EMBEDDING_MODEL_DIR", DEFAULT_MODELS)) / model
        self.encoder = sentence_transformer(folder)
        self.encoder.encode(["warm"] * BATCH, batch_size=BATCH, show_progress_bar=False)

    def run(self) -> None:
        while self.batch():
            pass

    def batch(self) -> int:
        with self.connection.transaction(), self.connection.cursor() as cursor:
            cursor.execute(
                f"select id, context_header || E'\\n' || chunk_text from {self.table} "
                f"where embedding is null order by id limit {BATCH}".encode()
            )
            rows = cursor.fetchall()
            vectors = self.encoder.encode([row[1] for row in rows], batch_size=BATCH, show_progress_bar=False)
            cursor.executemany(
                f"update {self.table} set embedding = %s where id = %s".encode(),
                [(vector, row[0]) for vector, row in zip(vectors, rows, strict=True)],
            )
        return len(rows)


def pipeline(options: Namespace) -> Table:
    with connect() as ours, connect() as theirs:
        dimensions = model_dimensions(ours, options.model)
        called, scripted = create(ours, "called", dimensions), create(ours, "scripted", dimensions)
        declare(ours, called, options.model)
        copy_indexes(ours, called, scripted)
        script = Pipeline(theirs, scripted, options.model)
        run(ours, f"select embed('warm', {quoted(ours, options.model)})")
        rows = sample(options.rows)
        rates = interleaved(
            {
                CALL: lambda: rate(ours, called, rows, lambda: run(ours, f"call embed_pending({BATCH}, '{called}')")),
                SCRIPT: lambda: rate(ours, scripted, rows, script.run),
            },
            options.rounds,
        )
        return table(
            rates, len(rows), agreement(ours, called, scripted), f"{options.model}; {versions(ours)}; {packages()}"
        )


def declare(connection: psycopg.Connection, name: str, model: str) -> None:
    source = "array['context_header', 'chunk_text']"
    run(connection, f"select embed_column('{name}', {source}, model => {quoted(connection, model)})")
    run(connection, f"select embed_index('{name}')")


def copy_indexes(connection: psycopg.Connection, source: str, target: str) -> None:
    """The indexes that the declaration made, under new names; the table's own came with it."""
    definitions = run(
        connection,
        "select pg_get_indexdef(indexrelid) from pg_index where indrelid = %s::regclass"
        " and not exists (select from pg_constraint where conindid = indexrelid) order by indexrelid",
        source,
    ).fetchall()
    for (definition,) in definitions:
        unnamed = re.sub(r"INDEX .*? ON (ONLY )?", "INDEX ON ", definition, count=1)
        run(connection, unnamed.replace(f"ON {source} ", f"ON {target} ", 1))


def rate(connection: psycopg.Connection, table: str, rows: list[Chunk], work: Callable[[], object]) -> float:
    run(connection, f"truncate {table}")
    fill(connection, table, rows)
    settle(connection, table)
    took = seconds(work)
    left = value(connection, f"select count(*) from {table} where embedding is null")
    if left:
        raise BenchError(f"{left} rows of {table} were left without a vector")
    return len(rows) / took


def agreement(connection: psycopg.Connection, called: str, scripted: str) -> float:
    """The least cosine between the two vectors of a chunk."""
    query = f"select min(1 - (c.embedding <=> s.embedding)) from {called} c join {scripted} s using (chunk_hash)"
    return float(np.float64(value(connection, query)))


def table(rates: dict[str, list[float]], rows: int, cosine: float, about: str) -> Table:
    medians = {name: median(found) for name, found in rates.items()}
    times = medians[CALL] / medians[SCRIPT]
    return Table(
        title=f"Filling {rows} chunks of the PostgreSQL manual",
        columns=("how", "rows/s, median", "from", "to", "ratio"),
        rows=tuple(
            (
                name,
                f"{medians[name]:.1f}",
                f"{min(found):.1f}",
                f"{max(found):.1f}",
                f"{medians[name] / medians[SCRIPT]:.2f}",
            )
            for name, found in rates.items()
        ),
        notes=(
            f"{len(rates[CALL])} rounds, interleaved; same layout, indexes and rows, model loaded before",
            "target: at least 1.0",
            f"least cosine between the two vectors of a chunk: {cosine:.6f}",
            about,
            machine(),
        ),
        figures={"rows": rows, "rates": rates, "ratio": round(times, 3), "least_cosine": cosine},
    )
