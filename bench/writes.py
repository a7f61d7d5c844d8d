"""What a declared column costs those who write: COPY into the table, UPDATE of another column."""

import base64
import hashlib
import random
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import psycopg

from bench import corpus
from bench.database import (
    SCHEMA,
    connect,
    interleaved,
    model_dimensions,
    quoted,
    run,
    seconds,
    server_seconds,
    settle,
    versions,
)
from bench.report import Table, machine

WORDS = (
    "row",
    "vector",
    "table",
    "column",
    "index",
    "key",
    "query",
    "page",
    "lock",
    "write",
    "plan",
    "block",
    "commit",
)
WITHOUT, WITH = "without", "declared"
COPY_TARGET, UPDATE_TARGET = 1.15, 1.1


@dataclass(frozen=True)
class Costs:
    """Seconds by the clock, and the backend's processor seconds, of each round without and with the declaration."""

    wall: dict[str, list[float]]
    cpu: dict[str, list[float]]


@dataclass(frozen=True)
class Update:
    """One update measurement: how long the texts are, and whether their vectors are there."""

    text_bytes: int
    embedded: bool

    def __str__(self) -> str:
        size = f"{self.text_bytes} B" if self.text_bytes < 1000 else f"{self.text_bytes // 1000} kB"
        return f"UPDATE beside {size} texts, {'embedded' if self.embedded else 'pending'}"


UPDATES = (
    Update(500, embedded=True),
    Update(500, embedded=False),
    Update(10_000, embedded=True),
    Update(10_000, embedded=False),
)


def writes(options: Namespace) -> Table:
    with connect() as connection:
        dimensions = model_dimensions(connection, options.model)
        measured = {
            f"COPY of {options.copy_rows} rows, {name}": (COPY_TARGET, copies(connection, dimensions, options, bare))
            for name, bare in (("the demo's table", False), ("key and text alone", True))
        }
        for update in UPDATES:
            measured[str(update)] = (UPDATE_TARGET, updates(connection, dimensions, update, options))
        drop_tables(connection)
        return table(measured, options, versions(connection))


def make_tables(connection: psycopg.Connection, dimensions: int, model: str, bare: bool = True) -> None:
    """Two alike, of which one is declared; autovacuum would come at its own times."""
    drop_tables(connection)
    for name in (WITHOUT, WITH):
        if bare:
            columns = "id bigint primary key, content text, views int not null default 0"
            run(connection, f"create table {SCHEMA}.{name} ({columns}, embedding vector({dimensions}))")
        else:
            corpus.create(connection, name, dimensions)
        run(connection, f"alter table {SCHEMA}.{name} set (autovacuum_enabled = false)")
    source = "'content'" if bare else "array['context_header', 'chunk_text']"
    run(connection, f"select embed_column('{SCHEMA}.{WITH}', {source}, model => {quoted(connection, model)})")


def drop_tables(connection: psycopg.Connection) -> None:
    for name in (WITHOUT, WITH):
        run(connection, f"drop table if exists {SCHEMA}.{name}")


def copies(connection: psycopg.Connection, dimensions: int, options: Namespace, bare: bool) -> Costs:
    make_tables(connection, dimensions, options.model, bare)
    texts = sentences(500, options.copy_rows)
    data = "".join(map(bare_line if bare else demo_line, range(options.copy_rows), texts)).encode()
    columns = "id, content" if bare else corpus.COLUMNS

    def prepare(name: str) -> None:
        run(connection, f"truncate {SCHEMA}.{name}")
        settle(connection, f"{SCHEMA}.{name}")

    def measure(name: str) -> None:
        copy(connection, f"{SCHEMA}.{name} ({columns})", data)

    return measured_rounds(connection, prepare, measure, options.write_rounds)


def bare_line(number: int, text: str) -> str:
    return f"{number}\t{text}\n"


def demo_line(number: int, text: str) -> str:
    digest = hashlib.sha256(f"{number} {text}".encode()).hexdigest()
    return f"{digest}\t{text}\tPart I. Tutorial\tpage-{number // 20}.html\t{number % 20}\t20\n"


def updates(connection: psycopg.Connection, dimensions: int, update: Update, options: Namespace) -> Costs:
    make_tables(connection, dimensions, options.model)
    texts = (
        sentences(500, options.update_rows)
        if update.text_bytes < 1000
        else noise(update.text_bytes, options.update_rows)
    )
    vector = unit_vectors(dimensions)
    data = "".join(
        f"{number}\t{text}\t{next(vector) if update.embedded else chr(92) + 'N'}\n" for number, text in enumerate(texts)
    ).encode()
    for name in (WITHOUT, WITH):
        copy(connection, f"{SCHEMA}.{name} (id, content, embedding)", data)

    def prepare(name: str) -> None:
        settle(connection, f"{SCHEMA}.{name}")

    def measure(name: str) -> None:
        run(connection, f"update {SCHEMA}.{name} set views = views + 1")

    return measured_rounds(connection, prepare, measure, options.write_rounds)


def measured_rounds(
    connection: psycopg.Connection, prepare: Callable[[str], None], measure: Callable[[str], None], rounds: int
) -> Costs:
    """The first round only warms caches, and lets both tables reach the size that they keep."""
    cpu: dict[str, list[float]] = {WITHOUT: [], WITH: []}

    def once(name: str) -> float:
        prepare(name)
        return seconds(lambda: cpu[name].append(server_seconds(connection, lambda: measure(name))))

    wall = interleaved({WITHOUT: lambda: once(WITHOUT), WITH: lambda: once(WITH)}, rounds + 1)
    return Costs(*({name: times[1:] for name, times in kind.items()} for kind in (wall, cpu)))


def copy(connection: psycopg.Connection, target: str, data: bytes) -> None:
    with connection.cursor() as cursor, cursor.copy(f"copy {target} from stdin".encode()) as stream:
        stream.write(data)


def sentences(size: int, count: int) -> Iterator[str]:
    chance = random.Random(1)
    for _ in range(count):
        yield " ".join(chance.choices(WORDS, k=size // 5))[:size]


def noise(size: int, count: int) -> Iterator[str]:
    """Text that does not compress, so that it is stored out of line as it is."""
    chance = random.Random(2)
    for _ in range(count):
        yield base64.b64encode(chance.randbytes(size * 3 // 4)).decode()


def unit_vectors(dimensions: int) -> Iterator[str]:
    chance = random.Random(3)
    pool = [[chance.gauss(0, 1) for _ in range(dimensions)] for _ in range(64)]
    texts = [f"[{','.join(f'{x / sum(y * y for y in vector) ** 0.5:.6f}' for x in vector)}]" for vector in pool]
    while True:
        yield from texts


def table(measured: dict[str, tuple[float, Costs]], options: Namespace, about: str) -> Table:
    figures: dict[str, Any] = {
        name: {
            "seconds": costs.wall,
            "server_seconds": costs.cpu,
            "ratio": round(paired_ratio(costs.wall), 3),
            "server_ratio": round(paired_ratio(costs.cpu), 3),
        }
        for name, (_, costs) in measured.items()
    }
    return Table(
        title="What a deferred column costs those who write",
        columns=("statement", "without, s", "declared, s", "ratio", "ratio of the backend's CPU time", "target"),
        rows=tuple(
            (
                name,
                f"{median(costs.wall[WITHOUT]):.3f}",
                f"{median(costs.wall[WITH]):.3f}",
                f"{figures[name]['ratio']:.2f}",
                f"{figures[name]['server_ratio']:.2f}",
                f"≤ {target}",
            )
            for name, (target, costs) in measured.items()
        ),
        notes=(
            f"UPDATE of an integer in {options.update_rows} rows",
            f"{options.write_rounds} rounds, interleaved; vacuum and checkpoint before each; ratios are medians of the "
            "rounds' own, whose two sides ran next to each other",
            about,
            machine(),
        ),
        figures=figures,
    )


def paired_ratio(times: dict[str, list[float]]) -> float:
    return median(declared / without for without, declared in zip(times[WITHOUT], times[WITH], strict=True))
