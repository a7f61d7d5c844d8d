"""An hour of writes by several clients with a worker on, two of its kills included; shortened unless asked for.

AUTOEMBED_SOAK_SECONDS says how long the clients write (60 unless set; 3600 is the hour). The rate is bounded, so that
the worker keeps up and what is measured is not the queue.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from psycopg import errors

from conftest import TEXTS
from support.rigging import leftovers, scalar
from support.server import Connection, Server

SECONDS = float(os.environ.get("AUTOEMBED_SOAK_SECONDS", "60"))
CLIENTS = 3
WRITES_PER_SECOND = 2.0
WARM_UP = 0.3
"""The share of the time after which the worker's memory is taken first; GROWTH is what it may become by the end."""
GROWTH = 1.15
WRONG = """
    select count(*) from knowledge k
    where nullif(btrim(k.content), '') is not null
      and (k.embedding is null or k.embedding <=> embed(k.content, 'all-MiniLM-L6-v2', 'document') > 1e-5)
"""


class Writer(threading.Thread):
    """Inserts, updates and deletes at random; now and then a blank text, or a write that is rolled back."""

    def __init__(self, connection: Connection, seed: int, end: float) -> None:
        super().__init__(daemon=True)
        self.connection, self.chance, self.end = connection, random.Random(seed), end
        self.written = 0

    def run(self) -> None:
        while time.monotonic() < self.end:
            time.sleep(self.chance.expovariate(WRITES_PER_SECOND / CLIENTS))
            self.write()
            self.written += 1

    def write(self) -> None:
        text = f"{self.chance.choice(TEXTS)} {self.chance.random()}" if self.chance.random() > 0.05 else " "
        some = "(select id from knowledge order by random() limit 1)"
        statements = {
            "insert into knowledge (content) values (%s)": 5,
            f"update knowledge set content = %s where id = {some}": 4,
            f"delete from knowledge where id = {some} and %s::text is not null": 2,
        }
        [statement] = self.chance.choices([*statements], weights=[*statements.values()])
        try:
            with self.connection.transaction(force_rollback=self.chance.random() < 0.1):
                self.connection.execute(statement.encode(), [text])
        except errors.DeadlockDetected:
            pass


class Keeper(threading.Thread):
    """Keeps a worker on, as pg_cron does: a new one when the last has gone."""

    def __init__(self, connect: Callable[..., Connection], end: float) -> None:
        super().__init__(daemon=True)
        self.connect, self.end = connect, end
        self.pid = 0
        self.deaths = 0

    def run(self) -> None:
        while time.monotonic() < self.end:
            connection = self.connect()
            self.pid = connection.info.backend_pid
            try:
                connection.execute(
                    f"call embed_worker(max_seconds => {max(1, round(self.end - time.monotonic()))})".encode()
                )
            except psycopg.Error:
                self.deaths += 1


def private_memory(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))


@pytest.mark.slow
def test_soak(
    db: Connection, connect: Callable[..., Connection], knowledge: Callable[..., str], server: Server
) -> None:
    knowledge(20)
    db.execute("select embed_column('knowledge', 'content'::name, model => 'all-MiniLM-L6-v2')")
    started = time.monotonic()
    end = started + SECONDS
    keeper = Keeper(connect, end + 60)
    keeper.start()
    writers = [Writer(connect(), seed, end) for seed in range(CLIENTS)]
    for writer in writers:
        writer.start()
    for share in (0.1, 0.2):
        time.sleep(max(0.0, started + share * SECONDS - time.monotonic()))
        db.execute("select pg_terminate_backend(%s)", [keeper.pid])
    time.sleep(max(0.0, started + (0.2 + WARM_UP) * SECONDS - time.monotonic()))
    warm = private_memory(keeper.pid)
    for writer in writers:
        writer.join()
    db.execute("call embed_wait('knowledge', '2 minutes')")
    grown = private_memory(keeper.pid) / warm
    assert keeper.deaths == 2
    assert sum(writer.written for writer in writers) > SECONDS * WRITES_PER_SECOND / 2
    assert scalar(db, WRONG) == 0
    assert grown < GROWTH
    db.execute("select pg_cancel_backend(%s)", [keeper.pid])
    keeper.end = 0
    keeper.join(timeout=30)
    assert leftovers(db) == {}
