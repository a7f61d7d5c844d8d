"""A throw-away PostgreSQL server with the installed extension."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import psycopg
from port_for import get_port
from pytest_postgresql.executors import PostgreSQLExecutor

Connection = psycopg.Connection[tuple[Any, ...]]

DATABASE = "autoembed"
PATIENCE = 60.0


def pg_config(option: str) -> Path:
    command = [os.environ.get("PG_CONFIG") or "pg_config", option]
    return Path(subprocess.check_output(command, text=True).strip())


def site() -> Path:
    """The installed product's venv; the newest, if several versions are there."""
    return max((pg_config("--pkglibdir") / "pg_autoembed").iterdir())


def add_model(directory: Path, folder: Path, name: str) -> None:
    """Registers a model folder in a model directory, as an administrator does."""
    python = str(site() / "bin" / "python")
    command = [python, "-I", "-m", "autoembed", "model", "add", str(folder), "--name", name]
    subprocess.run(command, env={**os.environ, "EMBEDDING_MODEL_DIR": str(directory)}, check=True)


def wait_until(predicate: Callable[[], object], timeout: float = PATIENCE, pause: float = 0.02) -> None:
    """Returns once predicate() is true; TimeoutError when it has not become so in time."""
    end = time.monotonic() + timeout
    while not predicate():
        if time.monotonic() > end:
            raise TimeoutError(f"not so after {timeout} s: {getattr(predicate, '__name__', predicate)}")
        time.sleep(pause)


@cache
def prepared(programs: Path) -> Path:
    """A cluster of these programs, made once: to copy it is quicker than initdb and create extension each time."""
    home = Path(tempfile.mkdtemp(prefix="autoembed-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    first = Server(home / "prepared", {}, {"fsync": "off"})
    first.make_cluster()
    shutil.rmtree(first.sockets, ignore_errors=True)
    return first.directory / "data"


class Executor(PostgreSQLExecutor):
    """One start of a server; its data outlive it."""

    def clean_directory(self) -> None:
        pass


class Server:
    """Its environment and settings may be changed while it is stopped.

    The database `autoembed` has the extension in it; shared servers use it as the template of each test's own.
    """

    def __init__(self, directory: Path, environment: Mapping[str, str], settings: Mapping[str, object]) -> None:
        self.directory = directory
        self.environment = dict(environment)
        self.settings = dict(settings)
        self.port = get_port(None) or 0
        self.sockets = tempfile.mkdtemp(prefix="autoembed-")
        self._executor: Executor | None = None

    def _make_executor(self) -> Executor:
        executor = Executor(
            executable=str(pg_config("--bindir") / "pg_ctl"),
            host="127.0.0.1",
            port=self.port,
            datadir=str(self.directory / "data"),
            unixsocketdir=self.sockets,
            logfile=str(self.directory / "log"),
            startparams="-w",
            dbname=DATABASE,
            postgres_options=" ".join(f"-c {name}='{value}'" for name, value in self.settings.items()),
        )
        executor._envvars.update(self.environment)
        executor._directory_initialised = (self.directory / "data").exists()
        return executor

    def create(self) -> None:
        """Starts a cluster with the database that has the extension."""
        self.directory.mkdir(parents=True)
        shutil.copytree(prepared(pg_config("--bindir")), self.directory / "data")
        self.start()

    def make_cluster(self) -> None:
        self.directory.mkdir(parents=True)
        self.start()
        with self.connect("postgres") as connection:
            connection.execute(f"create database {DATABASE}")
        with self.connect() as connection:
            connection.execute("create extension pg_autoembed cascade")
        self.stop()

    def start(self) -> None:
        self._executor = self._make_executor()
        self._executor.start()
        self.wait_until_ready()

    def stop(self) -> None:
        """A fast shutdown."""
        assert self._executor is not None
        self._executor.stop()

    def restart(self) -> None:
        self.stop()
        self.start()

    def kill(self) -> None:
        """SIGKILL to the postmaster and all its children, as by a power cut."""
        postmaster = psutil.Process(self.pid)
        family = [postmaster, *postmaster.children(recursive=True)]
        for process in family:
            with suppress(psutil.NoSuchProcess):  # a child ends by itself once its postmaster is gone
                process.kill()
        psutil.wait_procs(family, timeout=PATIENCE)

    def destroy(self) -> None:
        if self.running:
            self.stop()
        shutil.rmtree(self.directory / "data", ignore_errors=True)
        shutil.rmtree(self.sockets, ignore_errors=True)

    @property
    def pid(self) -> int:
        return int((self.directory / "data" / "postmaster.pid").read_text().split()[0])

    @property
    def running(self) -> bool:
        return self._executor is not None and self._executor.running()

    @property
    def log(self) -> str:
        """The server's whole log so far."""
        return (self.directory / "log").read_text()

    def dsn(self, dbname: str = DATABASE, role: str = "postgres") -> str:
        return psycopg.conninfo.make_conninfo(host=self.sockets, port=self.port, dbname=dbname, user=role)

    def connect(self, dbname: str = DATABASE, role: str = "postgres", *, autocommit: bool = True) -> Connection:
        return psycopg.connect(self.dsn(dbname, role), autocommit=autocommit)

    def wait_until_ready(self) -> None:
        """Until the server takes connections (again): it recovers first after a crash."""
        wait_until(self._takes_connections)

    def _takes_connections(self) -> bool:
        try:
            self.connect("postgres").close()
        except psycopg.OperationalError:
            return False
        return True
