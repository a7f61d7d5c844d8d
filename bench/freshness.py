"""How long a new row waits for its vector while a worker is on, COMMIT to COMMIT; and what waiting costs.

Rows come one by one, at random intervals, as a person or an application writes them.
"""

import random
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import psycopg

from bench.corpus import create, fill, sample
from bench.database import BenchError, connect, model_dimensions, quoted, run, settle, value, versions
from bench.pipeline import declare
from bench.report import Table, machine

TARGETS = {"p50": 0.3, "p99": 1.0, "tick": 0.02}
LOOK = 0.004
PATIENCE = 30.0
TICKS = 15
TICK = "call autoembed.tick(batch => 32)"
IDLE_SECONDS = 10.0


def freshness(options: Namespace) -> Table:
    with connect() as ours, connect() as worker:
        table = create(ours, "fresh", model_dimensions(ours, options.model))
        declare(ours, table, options.model)
        run(worker, f"select embed('warm', {quoted(worker, options.model)})")
        with working(ours, worker) as pid:
            delays = sorted(measure(ours, table, options.fresh_rows))
            idle = idle_share(pid)
        settle(ours, table)
        ticks = sorted(tick() for _ in range(TICKS))
        return make_table(delays, ticks, idle, f"{options.model}; {versions(ours)}")


@contextmanager
def working(ours: psycopg.Connection, worker: psycopg.Connection) -> Iterator[int]:
    """A worker in a thread of its own; it is cancelled in the end."""
    failed: list[psycopg.Error] = []

    def work() -> None:
        try:
            run(worker, "call embed_worker(max_seconds => 3600)")
        except psycopg.errors.QueryCanceled:
            return
        except psycopg.Error as error:
            failed.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    pid = worker.info.backend_pid
    yield pid
    if not thread.is_alive():
        raise BenchError(f"the worker ended: {failed or 'another one is at work in this database'}")
    run(ours, "select pg_cancel_backend(%s)", pid)
    thread.join(PATIENCE)


def measure(connection: psycopg.Connection, table: str, rows: int) -> Iterator[float]:
    chunks = sample(rows + 1)
    chance = random.Random(1)
    fill(connection, table, chunks[:1])
    waited(connection, table, chunks[0].chunk_hash)  # the worker's first row prepares its statements
    for chunk in chunks[1:]:
        time.sleep(chance.uniform(0.2, 1.4))
        fill(connection, table, [chunk])
        yield waited(connection, table, chunk.chunk_hash)


def waited(connection: psycopg.Connection, table: str, row: str) -> float:
    committed = time.perf_counter()
    query = f"select embedding is not null from {table} where chunk_hash = %s"
    while not value(connection, query, row):
        time.sleep(LOOK)
        if time.perf_counter() - committed > PATIENCE:
            raise BenchError("the worker does not embed a new row")
    return time.perf_counter() - committed


def tick() -> float:
    """Seconds of a processor that pg_cron's job costs in a backend of its own with nothing pending."""
    with connect() as connection:
        pid = connection.info.backend_pid
        before = processor_seconds(pid)
        run(connection, TICK)
        return processor_seconds(pid) - before


def processor_seconds(pid: int) -> float:
    file = Path(f"/proc/{pid}/schedstat")
    if not file.exists():
        raise BenchError(f"{file} is not there: this section runs on the server's machine, under Linux")
    return int(file.read_text().split()[0]) / 1e9


def idle_share(pid: int) -> float:
    before = processor_seconds(pid)
    time.sleep(IDLE_SECONDS)
    return (processor_seconds(pid) - before) / IDLE_SECONDS


def percentile(found: list[float], share: float) -> float:
    """Of sorted figures: the smallest one that so many are not above."""
    return found[min(len(found) - 1, max(0, -(-int(share * len(found) * 100) // 100) - 1))]


def make_table(delays: list[float], ticks: list[float], idle: float, about: str) -> Table:
    p50, p99 = median(delays), percentile(delays, 0.99)
    cells = (
        ("COMMIT of a new row to its committed vector, p50", f"{1000 * p50:.0f} ms", f"{1000 * TARGETS['p50']:.0f} ms"),
        ("the same, p99", f"{1000 * p99:.0f} ms", f"{1000 * TARGETS['p99']:.0f} ms"),
        (
            "a tick with nothing pending, processor time",
            f"{1000 * median(ticks):.1f} ms",
            f"{1000 * TARGETS['tick']:.0f} ms",
        ),
        ("a worker with nothing pending, of one processor", f"{100 * idle:.1f} %", ""),
    )
    return Table(
        title=f"A new row's way to its vector, with a waiting worker ({len(delays)} rows)",
        columns=("what", "measured", "at most"),
        rows=cells,
        notes=(
            f"longest: {1000 * delays[-1]:.0f} ms",
            f"ticks: {len(ticks)}, each in a new session; the dearest {1000 * ticks[-1]:.1f} ms",
            about,
            machine(),
        ),
        figures={"delays": delays, "p50": p50, "p99": p99, "ticks": ticks, "idle_share": idle},
    )
