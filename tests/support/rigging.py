"""A server whose encoder a test can slow down, hold and kill (see faults/sitecustomize.py)."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from psycopg import sql

from support.server import Connection, Server, wait_until
from support.stubs import FAULTS

Row = tuple[Any, ...]
CRON: dict[str, object] = {
    "shared_preload_libraries": "pg_cron",
    "cron.database_name": "autoembed",
    "cron.use_background_workers": "on",
    "max_worker_processes": 20,
}


class Rig:
    """The files that the encoders of one server obey."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.models = directory / "models"
        directory.mkdir()
        self.models.mkdir()
        self.server: Server

    def environment(self, base: dict[str, str]) -> dict[str, str]:
        paths = [str(FAULTS), *filter(None, [base.get("PYTHONPATH")])]
        return base | {
            "PYTHONPATH": ":".join(paths),
            "AUTOEMBED_FAULTS": str(self.directory),
            "EMBEDDING_MODEL_DIR": str(self.models),
            "EMBEDDING_MODEL_NAME": "stub-384",
        }

    def reset(self) -> None:
        for name in ("pace", "hold", "kill", "encoding"):
            (self.directory / name).unlink(missing_ok=True)

    def pace(self, seconds: float) -> None:
        (self.directory / "pace").write_text(str(seconds))

    def kill_at(self, word: str) -> None:
        (self.directory / "kill").write_text(word)

    def encodings(self) -> list[tuple[int, int]]:
        """Process and number of texts of each micro-batch so far."""
        try:
            lines = (self.directory / "encoding").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [(int(pid), int(texts)) for pid, texts in (line.split() for line in lines)]

    def wait_for_encoding(self, pid: int, micro_batches: int = 1) -> None:
        wait_until(lambda: sum(each == pid for each, _ in self.encodings()) >= micro_batches)

    def hold(self, pid: int, micro_batch: int = 1) -> None:
        """From this micro-batch of the session on."""
        new = self.directory / "hold.new"
        new.write_text(f"{pid} {micro_batch}")
        new.rename(self.directory / "hold")

    def let_go(self) -> None:
        (self.directory / "hold").unlink(missing_ok=True)

    @contextmanager
    def encoding(self, connection: Connection, **options: object) -> Iterator[Filling]:
        """While the block runs, a fill has claimed its rows and is encoding them; afterwards it has ended."""
        self.reset()
        self.hold(connection.info.backend_pid)
        filling = Filling(connection, **options)
        try:
            self.wait_for_encoding(filling.pid)
            yield filling
        finally:
            self.let_go()
            filling.wait()


class Filling:
    """A fill in a thread of its own."""

    def __init__(self, connection: Connection, **options: object) -> None:
        self.connection = connection
        self.pid = connection.info.backend_pid
        self.future: Future[Row] = Future()
        self.thread = threading.Thread(target=self._run, args=(options,), daemon=True)
        self.thread.start()

    def _run(self, options: dict[str, object]) -> None:
        try:
            self.future.set_result(fill(self.connection, **options))
        except BaseException as error:  # noqa: BLE001 -- it is the result
            self.future.set_exception(error)

    def wait(self) -> None:
        self.future.exception(timeout=60)
        self.thread.join()

    @property
    def result(self) -> Row:
        """embedded, failed, skipped; raises what the call raised."""
        return self.future.result(timeout=60)

    @property
    def done(self) -> bool:
        return self.future.done()


def fill(connection: Connection, **options: object) -> Row:
    """Calls embed_pending; returns embedded, failed, skipped, and leaves out those that came from the cache."""
    arguments = sql.SQL(", ").join(sql.SQL("{} => {}").format(sql.Identifier(k), v) for k, v in options.items())
    row = connection.execute(sql.SQL("call embed_pending({})").format(arguments)).fetchone()
    assert row is not None
    return row[:3]


def scalar(connection: Connection, query: str, *parameters: object) -> Any:
    row = connection.execute(query, parameters).fetchone()
    assert row is not None
    return row[0]


def rows(connection: Connection, query: str, *parameters: object) -> list[Row]:
    return connection.execute(query, parameters).fetchall()


def cpu_seconds(pid: int) -> float:
    """What a backend has computed so far, however busy the machine is otherwise."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def holds_nothing(connection: Connection, pid: int) -> bool:
    """Of many looks at a backend that sleeps and now and then looks around hardly any meets it in a transaction."""
    asleep = "select backend_xmin is null and backend_xid is null from pg_stat_activity where pid = %s"
    looks = []
    for _ in range(30):
        time.sleep(0.01)
        looks.append(scalar(connection, asleep, pid))
    return looks.count(True) >= 24


def pending(connection: Connection, relation: str = "knowledge") -> int:
    return int(scalar(connection, f"select count(*) from {relation} where embedding is null"))


def leftovers(connection: Connection) -> dict[str, int]:
    """What a call must not leave behind, whatever happened to it; empty when all is well."""
    counted = {
        "advisory locks": "select count(*) from pg_locks l join pg_database d on d.oid = l.database"
        " where l.locktype = 'advisory' and d.datname = current_database()",
        "inflight rows": "select count(*) from autoembed.inflight",
        "twins": "select count(*) from autoembed.inflight_twin",
        "suspects": "select count(*) from autoembed.suspect",
        "failures": "select count(*) from autoembed.failure",
    }
    found = {name: scalar(connection, query) for name, query in counted.items()}
    return {name: count for name, count in found.items() if count}
