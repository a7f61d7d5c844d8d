"""Each section's title as the query: is one of the section's own chunks among the ten that are found?"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass

import psycopg
from demo.chunker import Topic, topics

from bench.corpus import corpus, create, fill
from bench.database import BenchError, model_dimensions, quoted, run, seconds, settle, value, versions
from bench.encoder import MINILM, folder_and_precision, registered_name
from bench.pipeline import declare, own_server
from bench.report import Table, machine

K = 10
INDEXED, EXACT = "embed_search with the HNSW index", "embed_search, exact"


@dataclass(frozen=True)
class Found:
    """The chunks found for each topic, nearest first, and the seconds that the searches took."""

    hashes: list[list[str]]
    seconds: float

    def recall(self, asked: Sequence[Topic], depth: int) -> float:
        return sum(
            bool(topic.chunk_hashes & set(hit[:depth])) for topic, hit in zip(asked, self.hashes, strict=True)
        ) / len(asked)

    def reciprocal_rank(self, asked: Sequence[Topic]) -> float:
        ranks = (
            next((1 / place for place, name in enumerate(hit, 1) if name in topic.chunk_hashes), 0.0)
            for topic, hit in zip(asked, self.hashes, strict=True)
        )
        return sum(ranks) / len(asked)


def recall(options: Namespace) -> Table:
    """Each precision on the same corpus, on a server of the benchmark's own."""
    every = topics(corpus())
    asked = every if options.topics >= len(every) else every[:: len(every) // options.topics]
    refused = {precision: folder_and_precision(MINILM, precision) for precision in options.precision}
    found: dict[str, dict[str, Found]] = {}
    with own_server() as server, server.connect() as connection:
        for precision in (precision for precision, why in refused.items() if not why):
            found[precision] = measure(connection, registered_name(MINILM, precision), asked)
        about = [f"{precision}: not measured, {why}" for precision, why in refused.items() if why]
        return table(found, asked, [*about, MINILM.published, versions(connection)])


def measure(connection: psycopg.Connection, model: str, asked: Sequence[Topic]) -> dict[str, Found]:
    name = embedded_corpus(connection, model)
    names: dict[int, str] = dict(run(connection, f"select id, chunk_hash from {name}").fetchall())
    before = index_scans(connection, name)
    found = {INDEXED: search(connection, name, asked, names)}
    if index_scans(connection, name) - before < len(asked):
        raise BenchError("the search did not use the HNSW index")
    run(connection, "set enable_indexscan = off")
    found[EXACT] = search(connection, name, asked, names)
    run(connection, "reset enable_indexscan")
    return found


def embedded_corpus(connection: psycopg.Connection, model: str) -> str:
    name = create(connection, "corpus", model_dimensions(connection, model))
    fill(connection, name, list(corpus()))
    declare(connection, name, model)
    run(connection, f"call embed_pending(32, '{name}')")
    if left := value(connection, f"select count(*) from {name} where embedding is null"):
        raise BenchError(f"{left} chunks have no vector: see embedding_failures")
    settle(connection, name)
    return name


def index_scans(connection: psycopg.Connection, name: str) -> int:
    query = "select sum(idx_scan) from pg_stat_user_indexes where relid = %s::regclass and indexrelname like %s"
    run(connection, "select pg_stat_force_next_flush()")
    return int(value(connection, query, name, "%\\_hnsw") or 0)


def search(connection: psycopg.Connection, name: str, asked: Sequence[Topic], names: dict[int, str]) -> Found:
    hashes: list[list[str]] = []

    def ask_all() -> None:
        for topic in asked:
            query = f"select (key->>'id')::bigint from embed_search('{name}', {quoted(connection, topic.title)}, {K})"
            hashes.append([names[row[0]] for row in run(connection, query)])

    took = seconds(ask_all)
    return Found(hashes, took)


def table(found: dict[str, dict[str, Found]], asked: Sequence[Topic], about: Sequence[str]) -> Table:
    figures = {
        f"{search}, {precision}": {
            "recall_at_1": hits.recall(asked, 1),
            "recall_at_10": hits.recall(asked, K),
            "mrr_at_10": hits.reciprocal_rank(asked),
            "ms_per_search": 1000 * hits.seconds / len(asked),
        }
        for precision, both in found.items()
        for search, hits in both.items()
    }
    overlaps = ", ".join(f"{precision} {overlap(both):.1%}" for precision, both in found.items())
    recalls = {precision: round(both[EXACT].recall(asked, K), 4) for precision, both in found.items()}
    return Table(
        title=f"Finding a section of the PostgreSQL manual by its title: {len(asked)} sections, {len(corpus())} chunks",
        columns=("search", "recall@1", "recall@10", "MRR@10", "ms a search"),
        rows=tuple(
            (
                name,
                f"{figure['recall_at_1']:.3f}",
                f"{figure['recall_at_10']:.3f}",
                f"{figure['mrr_at_10']:.3f}",
                f"{figure['ms_per_search']:.1f}",
            )
            for name, figure in figures.items()
        ),
        notes=(
            "found: a chunk of the section itself; one of a section inside or beside it does not count",
            f"of the ten nearest chunks the index finds: {overlaps}",
            *about,
            machine(),
        ),
        figures=figures | {"sections": len(asked), "chunks": len(corpus())},
        published={"recall_at_10": recalls},
    )


def overlap(both: dict[str, Found]) -> float:
    same = sum(len(set(a) & set(b)) for a, b in zip(both[INDEXED].hashes, both[EXACT].hashes, strict=True))
    return same / sum(len(hit) for hit in both[EXACT].hashes)
