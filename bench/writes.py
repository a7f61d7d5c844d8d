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
from bench.database import SCHEMA, connect, interleaved, model_dimensions, quoted, ratio, run, seconds, settle, versions
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


def copies(connection: psycopg.Connection, dimensions: int, options: Namespace, bare: bool) -> dict[str, list[float]]:
    make_tables(connection, dimensions, options.model, bare)
    texts = sentences(500, options.copy_rows)
    data = "".join(map(bare_line if bare else demo_line, range(options.copy_rows), texts)).encode()
    columns = "id, content" if bare else corpus.COLUMNS

    def measure(name: str) -> float:
        run(connection, f"truncate {SCHEMA}.{name}")
        settle(connection, f"{SCHEMA}.{name}")
        return seconds(lambda: copy(connection, f"{SCHEMA}.{name} ({columns})", data))

    return measured_rounds(measure, options.write_rounds)


def bare_line(number: int, text: str) -> str:
    return f"{number}\t{text}\n"


def demo_line(number: int, text: str) -> str:
    digest = hashlib.sha256(f"{number} {text}".encode()).hexdigest()
    return f"{digest}\t{text}\tPart I. Tutorial\tpage-{number // 20}.html\t{number % 20}\t20\n"


def updates(
    connection: psycopg.Connection, dimensions: int, update: Update, options: Namespace
) -> dict[str, list[float]]:
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

    def measure(name: str) -> float:
        settle(connection, f"{SCHEMA}.{name}")
        return seconds(lambda: run(connection, f"update {SCHEMA}.{name} set views = views + 1"))

    return measured_rounds(measure, options.write_rounds)


def measured_rounds(measure: Callable[[str], float], rounds: int) -> dict[str, list[float]]:
    """The first round only warms caches, and lets both tables reach the size that they keep."""
    found = interleaved({name: lambda name=name: measure(name) for name in (WITHOUT, WITH)}, rounds + 1)  # type: ignore[misc]
    return {name: times[1:] for name, times in found.items()}


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


def table(measured: dict[str, tuple[float, dict[str, list[float]]]], options: Namespace, about: str) -> Table:
    figures: dict[str, Any] = {
        name: {"seconds": times, "ratio": round(ratio(times, WITH, WITHOUT), 3)}
        for name, (_, times) in measured.items()
    }
    return Table(
        title="What a deferred column costs those who write",
        columns=("statement", "without, s", "declared, s", "ratio", "target"),
        rows=tuple(
            (
                name,
                f"{median(times[WITHOUT]):.3f}",
                f"{median(times[WITH]):.3f}",
                f"{figures[name]['ratio']:.2f}",
                f"≤ {target}",
            )
            for name, (target, times) in measured.items()
        ),
        notes=(
            f"UPDATE of an integer in {options.update_rows} rows",
            f"medians of {options.write_rounds} rounds, interleaved; vacuum and checkpoint before each",
            about,
            machine(),
        ),
        figures=figures,
    )
