"""The demo's chunks as the benchmarks' rows."""

import os
from dataclasses import astuple
from functools import cache
from pathlib import Path

import psycopg
from demo.chunker import Chunk, chunks

from bench.database import SCHEMA, BenchError, copy_rows, run

COLUMNS = "chunk_hash, chunk_text, context_header, source_file, chunk_index, total_chunks"


@cache
def corpus() -> tuple[Chunk, ...]:
    if not os.environ.get("AUTOEMBED_DOC_DIR"):
        raise BenchError("AUTOEMBED_DOC_DIR is not set: `make bench` sets it")
    return tuple(chunks(Path(os.environ["AUTOEMBED_DOC_DIR"])))


def sample(size: int) -> list[Chunk]:
    """Chunks spread evenly over the corpus: always the same ones."""
    every = corpus()
    return list(every) if size >= len(every) else [every[index * len(every) // size] for index in range(size)]


def content(chunk: Chunk) -> str:
    """What is embedded: the source columns, joined as the extension joins them."""
    return f"{chunk.context_header}\n{chunk.chunk_text}"


def create(connection: psycopg.Connection, table: str, dimensions: int) -> str:
    """An empty table like the demo's."""
    name = f"{SCHEMA}.{table}"
    schema = (Path(__file__).parents[1] / "demo" / "schema.sql").read_text().replace(":dimensions", str(dimensions))
    statement = next(text for text in schema.split("\n\n") if text.startswith("create table knowledge_base "))
    run(connection, f"drop table if exists {name}")
    run(connection, statement.strip().rstrip(";").replace("knowledge_base", name, 1))
    return name


def fill(connection: psycopg.Connection, name: str, rows: list[Chunk]) -> None:
    copy_rows(connection, f"{name} ({COLUMNS})", [astuple(chunk) for chunk in rows])
