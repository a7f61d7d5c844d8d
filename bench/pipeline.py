"""`call embed_pending(32)` against the encoder alone and against the plain pipeline: what the database costs and saves.

The plain pipeline is the script that one writes without the extension: fetch 32, SentenceTransformer.encode, 32
updates, commit. Both fill tables of the same layout, with the same indexes and rows, with a model that is loaded
already, on a server of the benchmark's own. The encoder alone has the same texts in the same batches.
"""

import re
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import md5
from pathlib import Path
from statistics import median

import numpy as np
import psycopg
from demo.chunker import Chunk
from pgvector.psycopg import register_vector

from bench import fresh
from bench.architectures import MPNET, Architecture, texts
from bench.cold import Server
from bench.corpus import content, create, fill
from bench.database import (
    SCHEMA,
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
from bench.encoder import MINILM, folder_and_precision, folder_of, registered_name, shelf
from bench.reference import sentence_transformer
from bench.report import Table, machine, packages

BATCH = 32
SCRIPT = f"psycopg and SentenceTransformer.encode(batch_size={BATCH})"
STAGES = ("claim", "encode", "write")
MINILM_ROWS = 8  # for each of the large model's: it is so much quicker


class Pipeline:
    """The script that one writes without the extension."""

    def __init__(self, connection: psycopg.Connection, table: str, folder: Path) -> None:
        register_vector(connection)
        self.connection, self.table = connection, table
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


def pipeline(options: Namespace) -> Iterator[Table]:
    for architecture, rows in ((MPNET, options.rows), (MINILM, options.rows * MINILM_ROWS)):
        with own_server() as server, server.connect() as ours, server.connect() as theirs:
            yield compare(architecture, chunks_of(rows), options, ours, theirs)


@contextmanager
def own_server() -> Iterator[Server]:
    """With the benchmarks' models, and the extension."""
    with connect() as connection:
        server = Server(Path(value(connection, "select setting from pg_config where name = 'BINDIR'")), shelf())
    try:
        with server.started(preload=""):
            with server.connect() as connection:
                run(connection, "create extension pg_autoembed cascade")
                run(connection, f"create schema {SCHEMA}")
            yield server
    finally:
        shutil.rmtree(server.directory)


def chunks_of(rows: int) -> list[Chunk]:
    """The encoder's texts as the demo's chunks, as often as they are needed."""
    every = texts(MPNET.folder(), rows)
    return [
        Chunk(md5(f"{number}".encode()).hexdigest(), every[number % len(every)], "The manual", "manual")
        for number in range(rows)
    ]


def compare(
    architecture: Architecture,
    rows: list[Chunk],
    options: Namespace,
    ours: psycopg.Connection,
    theirs: psycopg.Connection,
) -> Table:
    refused = {precision: folder_and_precision(architecture, precision) for precision in options.precision}
    tables = {precision: prepared(ours, architecture, precision) for precision, why in refused.items() if not why}
    scripted = create(ours, "scripted", architecture.width)
    copy_indexes(ours, next(iter(tables.values())), scripted)
    script = Pipeline(theirs, scripted, folder_of(architecture))
    measures: dict[str, Callable[[], float]] = {SCRIPT: lambda: rate(ours, scripted, rows, script.run)}
    for precision, name in tables.items():
        measures[called(precision)] = lambda name=name: call(ours, name, rows)  # type: ignore[misc]
        model = registered_name(architecture, precision)
        measures[alone(precision)] = lambda model=model: encode(model, rows)  # type: ignore[misc]
    rates = interleaved(measures, options.rounds)
    stages = {called(precision): shares(ours, name) for precision, name in tables.items()}
    cosines = {called(precision): agreement(ours, name, scripted) for precision, name in tables.items()}
    notes = [f"{precision}: not measured, {why}" for precision, why in refused.items() if why]
    return table(
        architecture,
        list(tables),
        rates,
        stages,
        cosines,
        [f"{len(rows)} rows", *notes, versions(ours), packages(), machine()],
    )


def called(precision: str) -> str:
    return f"call embed_pending({BATCH}), {precision}"


def alone(precision: str) -> str:
    return f"the encoder alone, {precision}"


def prepared(connection: psycopg.Connection, architecture: Architecture, precision: str) -> str:
    """A declared table, and its model warm in this session."""
    model = registered_name(architecture, precision)
    name = create(connection, f"called_{precision}", model_dimensions(connection, model))
    declare(connection, name, model)
    run(connection, f"select embed('warm', {quoted(connection, model)})")
    return name


def call(connection: psycopg.Connection, name: str, rows: list[Chunk]) -> float:
    return rate(connection, name, rows, lambda: run(connection, f"call embed_pending({BATCH}, '{name}')"))


def encode(model: str, rows: list[Chunk]) -> float:
    found = fresh.run("alone", directory=str(shelf()), name=model, texts=[content(chunk) for chunk in rows])
    return float(found["texts_per_second"])


def shares(connection: psycopg.Connection, name: str) -> dict[str, float]:
    """Each stage's part of the time, by the extension's own account."""
    sums = ", ".join(f"sum({stage}_seconds)" for stage in STAGES)
    row = run(connection, f"select {sums} from embedding_throughput where relation = %s::regclass", name).fetchone()
    assert row is not None
    return {stage: float(took) / sum(map(float, row)) for stage, took in zip(STAGES, row, strict=True)}


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


def table(
    architecture: Architecture,
    precisions: list[str],
    rates: dict[str, list[float]],
    stages: dict[str, dict[str, float]],
    cosines: dict[str, float],
    notes: list[str],
) -> Table:
    rows, figures, published = [], {}, {}
    for name, found in rates.items():
        figures[name] = {"rows_per_second": found, "ratio_to_plain": middle_ratio(found, rates[SCRIPT])}
        figures[name] |= {f"share_of_{stage}": share for stage, share in stages.get(name, {}).items()}
        split = " / ".join(f"{share:.1%}" for share in stages[name].values()) if name in stages else ""
        cosine = f"{cosines[name]:.6f}" if name in cosines else ""
        rows.append((name, f"{median(found):.2f}", f"{figures[name]['ratio_to_plain']:.2f}", split, cosine))
    for precision in precisions:
        published[precision] = {
            "ratio_to_plain": figures[called(precision)]["ratio_to_plain"],
            "share_of_encoder": middle_ratio(rates[called(precision)], rates[alone(precision)]),
        }
    told = "; ".join(f"{precision} {found['share_of_encoder']:.1%}" for precision, found in published.items())
    return Table(
        part=architecture.name,
        title=f"Filling a table: {architecture.published}'s architecture",
        columns=("how", "rows/s, median", "ratio", f"{', '.join(STAGES)}", "least cosine"),
        rows=tuple(rows),
        notes=(f"a call's speed as a share of the encoder's alone: {told}", "rounds of turns, medians", *notes),
        figures=figures | {"published": published},
        published={"pipeline": published} if architecture is MPNET else {},
    )


def middle_ratio(found: list[float], base: list[float]) -> float:
    """Of the rounds' own ratios."""
    return round(median(one / other for one, other in zip(found, base, strict=True)), 3)
