"""What a claim costs where much else is in the table, and what a fill costs a client who updates the rows it fills.

Claims are made through the same functions as a call's, by an ordinary owner: row-level security costs him more than
a superuser.
"""

import random
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from statistics import median, quantiles

import psycopg

from bench.database import SCHEMA, connect, model_dimensions, quoted, run, value, versions
from bench.report import Table, machine
from bench.writes import sentences

ROLE = "autoembed_bench"
BATCH, PENDING, CLAIMS = 32, 1_000, 15
TEXT = "'text ' || g || repeat(' row vector table column', 12)"


@dataclass(frozen=True)
class Figure:
    """One line of the table; `asked` is its limit, where there is one."""

    name: str
    value: float
    unit: str
    asked: float | None = None

    def cells(self) -> tuple[str, str, str]:
        return self.name, f"{self.value:.2f} {self.unit}", "" if self.asked is None else f"≤ {self.asked:g} {self.unit}"


@dataclass
class Claims:
    """A declared table's claims, each given back at once."""

    connection: psycopg.Connection
    name: str

    def __post_init__(self) -> None:
        query = "select registration, column_sql from autoembed.columns(%s::regclass)"
        row = run(self.connection, query, self.name).fetchone()
        assert row is not None
        self.registration, self.column_sql = row

    def one(self, after: str | None = None) -> tuple[float, str]:
        """Milliseconds of the next batch's claim after that key, and the key that it came to."""
        run(self.connection, "begin")  # one transaction, as in a call; its commit flushes the log and is not counted
        started = time.perf_counter()
        found = run(
            self.connection,
            "select keys::text[], locks, cursor::text, inflight"
            " from autoembed.candidates(%s::autoembed.column_sql, %s::jsonb, %s)",
            self.column_sql, after, BATCH,
        ).fetchone()  # fmt: skip
        assert found is not None
        keys, locks, cursor, inflight = found
        claim = (
            "select cardinality(keys) from autoembed.claim(%s::autoembed.column_sql, %s, %s::text[]::jsonb[], false)"
        )
        claimed = value(self.connection, claim, self.column_sql, inflight, keys)
        took = 1000 * (time.perf_counter() - started)
        run(self.connection, "commit")
        run(self.connection, "select autoembed.forget(%s, %s)", self.registration, inflight)
        run(self.connection, "select autoembed.release(%s)", locks)
        assert claimed == BATCH
        return took, str(cursor)

    def median(self, after: str | None = None) -> float:
        self.one(after)
        return median(self.one(after)[0] for _ in range(CLAIMS))

    def frontier(self) -> str | None:
        """The key behind which the next call begins."""
        query = "select key::text from autoembed.frontier(%s::autoembed.column_sql)"
        key: str | None = value(self.connection, query, self.column_sql)
        return key

    def look(self) -> float:
        """Milliseconds of the question that a call and a worker ask before all else."""
        query = "select autoembed.any_due(%s::autoembed.column_sql)"
        return 1000 * median(elapsed(lambda: run(self.connection, query, self.column_sql)) for _ in range(CLAIMS))

    def following(self) -> float:
        """The claims of one call, each after the former's cursor."""
        took: list[float] = []
        cursor: str | None = None
        for _ in range(CLAIMS + 1):
            milliseconds, cursor = self.one(cursor)
            took.append(milliseconds)
        return median(took[1:])


def scale(options: Namespace) -> Table:
    with connect() as connection, ordinary_owner(connection):
        dimensions = model_dimensions(connection, options.model)
        figures = [
            *large_tables(connection, dimensions, options),
            *filled_without_vacuum(connection, dimensions, options),
            *behind_failures(connection, dimensions, options),
            *beside_a_client(connection, dimensions, options),
        ]
        return Table(
            title="Claims in large tables, and the latency of a client's UPDATEs beside a fill",
            columns=("what", "measured", "asked"),
            rows=tuple(figure.cells() for figure in figures),
            notes=(
                f"a claim: {BATCH} rows found, locked and read, by an owner who is no superuser, without the "
                f"commit's flush; medians of {CLAIMS}",
                versions(connection),
                machine(),
            ),
            figures={figure.name: figure.value for figure in figures},
        )


@contextmanager
def ordinary_owner(connection: psycopg.Connection) -> Iterator[None]:
    """The tables are his; he may declare and fill, and row-level security applies to him."""
    with suppress(psycopg.errors.DuplicateObject):
        run(connection, f"create role {ROLE} login")
    run(connection, f"grant usage, create on schema {SCHEMA} to {ROLE}")
    home = value(connection, "select extnamespace::regnamespace::text from pg_extension where extname = 'pg_autoembed'")
    run(connection, f"grant execute on all routines in schema {home} to {ROLE}")
    run(connection, f"set session authorization {ROLE}")
    try:
        yield
    finally:
        run(connection, "reset session authorization")
        run(connection, f"drop owned by {ROLE}")
        run(connection, f"drop role {ROLE}")


def declare(connection: psycopg.Connection, name: str, dimensions: int, options: Namespace) -> str:
    """Unlogged and not vacuumed by itself: what is measured is what a claim reads."""
    relation = f"{SCHEMA}.{name}"
    columns = f"id bigint primary key, content text, views int default 0, embedding vector({dimensions})"
    run(connection, f"create unlogged table {relation} ({columns}) with (autovacuum_enabled = false)")
    run(connection, f"select embed_column('{relation}', 'content', model => {quoted(connection, options.model)})")
    return relation


def any_vector(dimensions: int) -> str:
    return f"(select array_fill(0.05::float4, array[{dimensions}])::vector)"


def large_tables(connection: psycopg.Connection, dimensions: int, options: Namespace) -> Iterator[Figure]:
    """Statistics are old first: of a time when the table had 10,000 rows and all of them were pending."""
    old, new = [], []
    sizes = (10_000, options.scale_rows)
    for size in sizes:
        relation = declare(connection, f"rows_{size}", dimensions, options)
        vector, every = any_vector(dimensions), size // PENDING
        run(connection, f"insert into {relation} select g, {TEXT} from generate_series(1, 10000) g")
        run(connection, f"analyze {relation}")
        run(connection, f"update {relation} set embedding = {vector} where id % {every} <> 0")
        rest = f"case when g % {every} <> 0 then {vector} end from generate_series(10001, {size}) g"
        run(connection, f"insert into {relation} (id, content, embedding) select g, {TEXT}, {rest}")
        claims = Claims(connection, relation)
        with connect() as superuser:
            run(superuser, "checkpoint")  # what was written goes out before the clock runs, not while
        old.append(claims.median())
        run(connection, f"vacuum (analyze) {relation}")
        new.append(claims.median())
        run(connection, f"drop table {relation}")
    yield Figure(f"claim, {PENDING} pending of {sizes[0]} rows", new[0], "ms")
    yield Figure(f"claim, {PENDING} pending of {sizes[1]} rows", new[1], "ms")
    yield Figure("ratio of the two", new[1] / new[0], "times", 1.5)
    yield Figure("the same with old statistics", old[1] / old[0], "times", 1.5)


def filled_without_vacuum(connection: psycopg.Connection, dimensions: int, options: Namespace) -> Iterator[Figure]:
    size = options.scale_rows // 2
    relation = declare(connection, "filled", dimensions, options)
    run(connection, f"insert into {relation} select g, {TEXT} from generate_series(1, {size + PENDING}) g")
    run(connection, f"update {relation} set embedding = {any_vector(dimensions)} where id <= {size}")
    claims = Claims(connection, relation)
    yield Figure(f"first claim after {size} rows were filled, dead entries not marked", claims.one()[0], "ms")
    yield Figure("the same, dead entries marked", claims.median(), "ms")
    later = claims.following()
    run(connection, f"call embed_pending({BATCH}, '{relation}')")
    texts = f"select g, {TEXT} from generate_series({size + PENDING + 1}, {size + 2 * PENDING}) g"
    run(connection, f"insert into {relation} {texts}")
    yield Figure("first claim of a new call, where the last one ended", claims.median(claims.frontier()), "ms", 10)
    yield Figure("whether any row is due", claims.look(), "ms")
    run(connection, f"vacuum (analyze) {relation}")
    yield Figure("later claims of a call, against those after a vacuum", later / claims.following(), "times", 1.5)
    run(connection, f"drop table {relation}")


def behind_failures(connection: psycopg.Connection, dimensions: int, options: Namespace) -> Iterator[Figure]:
    """Their texts failed five times: not tried again. A call looks at each of them, in case its text is another now."""
    failed = options.failed_rows
    relation = declare(connection, "failed", dimensions, options)
    run(connection, f"insert into {relation} select g, {TEXT} from generate_series(1, {failed}) g")
    claims = Claims(connection, relation)
    run(
        connection,
        "insert into autoembed.failure (registration, key, hash, kind, message, attempts)"
        f" select %s, jsonb_build_array(id), autoembed.hash(content), 'encoder', 'made up', 5 from {relation}",
        claims.registration,
    )
    calls = [elapsed(lambda: run(connection, f"call embed_pending({BATCH}, '{relation}')")) for _ in range(2)]
    run(connection, f"insert into {relation} select g, {TEXT} from generate_series({failed + 1}, {failed + PENDING}) g")
    yield Figure(f"claim that finds work behind {failed} failed rows", claims.median(claims.frontier()), "ms", 10)
    yield Figure("a whole call with nothing to do but look at them", min(calls), "s")
    run(connection, f"drop table {relation}")


def elapsed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def beside_a_client(connection: psycopg.Connection, dimensions: int, options: Namespace) -> Iterator[Figure]:
    """A client updates random pending rows, one a transaction, beside a fill; and beside encoding without writing."""
    relation = declare(connection, "busy", dimensions, options)
    texts = [(number, text) for number, text in enumerate(sentences(400, 20_000))]
    with connection.cursor() as cursor, cursor.copy(f"copy {relation} (id, content) from stdin".encode()) as copy:
        for row in texts:
            copy.write_row(row)
    some = f"select array_agg(content) from (select content from {relation} limit {BATCH}) c"
    encode = f"select cardinality(embed(({some}), {quoted(connection, options.model)}))"
    worker = connect()
    run(worker, f"set session authorization {ROLE}")
    run(worker, encode)  # loads the model

    def load() -> None:
        run(worker, encode)

    def work() -> None:
        run(worker, f"call embed_pending({BATCH}, '{relation}', max_seconds => {options.busy_seconds})")

    beside_load, _ = latencies(relation, load, options.busy_seconds)
    beside_fill, waits = latencies(relation, work, options.busy_seconds)
    worker.close()
    yield Figure("client's UPDATE beside equal encoding, p50", quantiles(beside_load, n=100)[49], "ms")
    yield Figure("client's UPDATE beside a fill, p50", quantiles(beside_fill, n=100)[49], "ms")
    yield Figure("client's UPDATE beside equal encoding, p99", quantiles(beside_load, n=100)[98], "ms")
    yield Figure("client's UPDATE beside a fill, p99", quantiles(beside_fill, n=100)[98], "ms")
    yield Figure("client's lock waits seen in pg_stat_activity", waits, "", 0)
    run(connection, f"drop table {relation}")


def latencies(relation: str, load: Callable[[], None], seconds_long: float) -> tuple[list[float], int]:
    """Milliseconds of each UPDATE while `load` runs, again and again; how often the client waited for a lock."""
    end = time.monotonic() + seconds_long
    stop = threading.Event()
    waits = 0

    def keep_loading() -> None:
        while time.monotonic() < end:
            load()

    def watch(pid: int) -> None:
        nonlocal waits
        with connect() as watcher:
            while not stop.is_set():
                waiting = "select count(*) from pg_stat_activity where pid = %s and wait_event_type = 'Lock'"
                waits += value(watcher, waiting, pid)
                time.sleep(0.005)

    took: list[float] = []
    chance = random.Random(4)
    with connect() as client:
        threads = [
            threading.Thread(target=keep_loading),
            threading.Thread(target=watch, args=[client.info.backend_pid]),
        ]
        for thread in threads:
            thread.start()
        update = f"update {relation} set views = views + 1 where id = %s and embedding is null"
        while time.monotonic() < end:
            number = chance.randrange(20_000)
            took.append(1000 * elapsed(lambda number=number: run(client, update, number)))  # type: ignore[misc]
            time.sleep(0.002)
        stop.set()
        for thread in threads:
            thread.join()
    return took, waits
