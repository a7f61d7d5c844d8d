"""What a fresh session costs, with the model preloaded by the postmaster and without: time, memory, and connecting.

On a server of its own, once for each model with it preloaded, and once without.
"""

import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from textwrap import dedent
from typing import Any

import psycopg

from bench.architectures import MPNET
from bench.database import connect, run, seconds, value, versions
from bench.report import Table, machine, state_folder

MODELS = Path(os.environ.get("EMBEDDING_MODEL_DIR", "/var/lib/pg_autoembed/models"))
QUERY = "How do I find out which sessions wait for a lock?"
QUERIES, SESSIONS, TOGETHER, COLD_SESSIONS = 100, 20, 3.0, 3
MEGABYTE = 1024 * 1024
MINILM = "all-MiniLM-L6-v2"


@dataclass
class Server:
    """A throw-away cluster, run by the postgres user where we are root."""

    bindir: Path
    models: Path
    directory: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="autoembed-cold-")))

    def __post_init__(self) -> None:
        if os.geteuid() == 0:
            shutil.chown(self.directory, "postgres")
        self.call("initdb", "-U", "postgres", "-A", "trust", "-N")

    def call(self, program: str, *options: str, **environment: str) -> str:
        command = [str(self.bindir / program), "-D", str(self.directory / "data"), *options]
        return self.execute(command, EMBEDDING_MODEL_DIR=str(self.models), **environment)

    def execute(self, command: list[str], **environment: str) -> str:
        as_postgres = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        with (self.directory / "out").open("w+") as out:  # no pipe: the server would hold it open
            subprocess.run(
                [*as_postgres, *command], env=os.environ | environment, cwd="/", stdout=out, stderr=out, check=True
            )
            out.seek(0)
            return out.read()

    @contextmanager
    def started(self, preload: str) -> Iterator["Server"]:
        settings = {"unix_socket_directories": self.directory, "listen_addresses": "", "port": 5432}
        settings["shared_preload_libraries"] = "autoembed_preload" if preload else ""
        options = " ".join(f"-c {name}='{setting}'" for name, setting in settings.items())
        log = str(self.directory / "log")
        self.call("pg_ctl", "-s", "-w", "-l", log, "-o", options, "start", EMBEDDING_PRELOAD=preload)
        try:
            yield self
        finally:
            self.call("pg_ctl", "-s", "-m", "fast", "stop")

    def connect(self) -> psycopg.Connection[Any]:
        return psycopg.connect(host=str(self.directory), port=5432, user="postgres", autocommit=True)

    @property
    def pid(self) -> int:
        return int((self.directory / "data" / "postmaster.pid").read_text().split()[0])

    def connecting(self) -> float:
        """Milliseconds to connect, select 1 and disconnect."""
        script = self.directory / "select.sql"
        script.write_text("select 1;\n")
        options = ["-n", "-C", "-T", "5", "-f", str(script), "-h", str(self.directory), "-p", "5432", "-U", "postgres"]
        found = re.search(r"latency average = ([\d.]+)", self.execute([str(self.bindir / "pgbench"), *options]))
        assert found is not None
        return float(found[1])


def cold(options: Namespace) -> Table:
    with connect() as connection:
        bindir = Path(value(connection, "select setting from pg_config where name = 'BINDIR'"))
        about = versions(connection)
    models = model_directory()
    server = Server(bindir, models)
    try:
        figures = measure(server, options.cold_sessions)
    finally:
        shutil.rmtree(server.directory)
    return table(figures, about)


def model_directory() -> Path:
    """The packaged MiniLM, and a model of all-mpnet-base-v2's architecture; registered by this release."""
    from autoembed.adding.add import add_model

    directory = state_folder() / "cold"
    directory.mkdir(exist_ok=True)
    for source in (MODELS / MINILM, MPNET.folder()):
        add_model(source, directory, name=source.name, force=True)
    return directory


def measure(server: Server, sessions: int) -> dict[str, Any]:
    names = (MINILM, MPNET.name)
    figures: dict[str, Any] = {name: {} for name in names}
    with server.started(preload=""), server.connect() as connection:
        run(connection, "create extension pg_autoembed cascade")
        figures["connecting"] = server.connecting()
        for name in names:
            figures[name] |= not_preloaded(server, name)
    for name in names:
        with server.started(preload=name):
            figures[name] |= preloaded(server, name, sessions)
    return figures


def not_preloaded(server: Server, name: str) -> dict[str, float]:
    turns = [(first(server, name), first_by_reference(server, server.models / name)) for _ in range(COLD_SESSIONS)]
    ours, reference = map(median, zip(*turns, strict=True))
    return {"cold": ours, "reference": reference, "ratio": median(one / other for one, other in turns)}


def preloaded(server: Server, name: str, sessions: int) -> dict[str, float]:
    with server.connect() as connection:
        weights = value(connection, "select bytes from embedding_models where name = %s", name) / MEGABYTE
        took = [seconds(lambda: run(connection, "select embed(%s, %s)", QUERY, name)) for _ in range(QUERIES)]
        private = memory(connection.info.backend_pid, "Private")
    return {
        "first": median(first(server, name) for _ in range(sessions)),
        "query": median(took) * 1000,
        "private": private,
        "together": together(server, name),
        "weights": weights,
        "connecting": server.connecting(),
        "postmaster": memory(server.pid, "Anonymous"),
    }


def first(server: Server, name: str) -> float:
    """Milliseconds of a fresh session's first embed()."""
    with server.connect() as connection:
        return seconds(lambda: run(connection, "select embed(%s, %s)", QUERY, name)) * 1000


def first_by_reference(server: Server, folder: Path) -> float:
    """The same by sentence-transformers, as one writes it without the extension."""
    code = f"""
        from sentence_transformers import SentenceTransformer
        encoder = SentenceTransformer({str(folder)!r}, device="cpu", local_files_only=True)
        encoder.encode([{QUERY!r}], show_progress_bar=False)
    """
    with server.connect() as connection:
        run(connection, "select autoembed.start()")  # finds the packages
        return seconds(lambda: run(connection, f"do $$\n{dedent(code)}\n$$ language plpython3u")) * 1000


def together(server: Server, name: str) -> float:
    """Megabytes of sessions that embed all at once, and of the postmaster; what they share counts once."""
    with ExitStack() as stack:
        sessions = [stack.enter_context(server.connect()) for _ in range(SESSIONS)]
        until = time.monotonic() + TOGETHER
        threads = [threading.Thread(target=keep_embedding, args=(session, name, until)) for session in sessions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(memory(pid, "Pss") for pid in (server.pid, *(each.info.backend_pid for each in sessions)))


def keep_embedding(session: psycopg.Connection[Any], name: str, until: float) -> None:
    run(session, "select embed(%s, %s)", QUERY, name)
    while time.monotonic() < until:
        run(session, "select embed(%s, %s)", QUERY, name)


def memory(pid: int, kind: str) -> float:
    """Megabytes; Private is both of its kinds, clean and dirty."""
    lines = (line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    names = {f"{kind}:", f"{kind}_Clean:", f"{kind}_Dirty:"} if kind == "Private" else {f"{kind}:"}
    return sum(int(line[1]) for line in lines if line[0] in names) / 1024


def table(figures: dict[str, Any], about: str) -> Table:
    both = [figures[MINILM], figures[MPNET.name]]

    def line(title: str, form: str, limit: str = "") -> tuple[str, ...]:
        return title, *(form.format(**one, more=one["connecting"] - figures["connecting"]) for one in both), limit

    limits = ", ".join(f"{one['weights'] + SESSIONS * 60:.0f}" for one in both)
    return Table(
        title="A fresh session, with its model preloaded and without",
        columns=("what", MINILM, f"{MPNET.published}'s architecture", "at most"),
        rows=(
            line("first embed(), preloaded", "{first:.0f} ms", "150 ms"),
            line("first embed(), not preloaded", "{cold:.0f} ms"),
            line("the same by sentence-transformers in a DO block", "{reference:.0f} ms"),
            line("the one as a share of the other", "{ratio:.2f}", "0.34"),
            line("a later embed()", "{query:.0f} ms"),
            line(f"private memory after {QUERIES} queries", "{private:.0f} MB", "60 MB"),
            line(f"{SESSIONS} sessions at once and the postmaster (PSS)", "{together:.0f} MB", f"{limits} MB"),
            line("connect, select 1, disconnect: more than without", "{more:.1f} ms", "6 ms"),
            line("the postmaster's own memory", "{postmaster:.0f} MB"),
        ),
        notes=(f"connect, select 1, disconnect without preloading: {figures['connecting']:.1f} ms", about, machine()),
        figures=figures,
    )
