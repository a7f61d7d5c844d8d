"""A container of the image under test, by testcontainers."""

from __future__ import annotations

import os
import resource
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import docker  # type: ignore[import-untyped]
import psycopg
from docker.types import Ulimit  # type: ignore[import-untyped]
from testcontainers.core.container import DockerContainer

IMAGE = os.environ["AUTOEMBED_IMAGE"]
ENGINE = os.environ["AUTOEMBED_ENGINE"]
BUILD_OPTIONS = os.environ.get("AUTOEMBED_BUILD_OPTIONS", "").split()
DATA = "/var/lib/postgresql/data"
MODELS = "/var/lib/pg_autoembed/models"
PASSWORD = "a password that stands nowhere else"
HEALTHY_WITHIN = 60.0
Mounts = Mapping[str, str]


def ulimits() -> list[Ulimit]:
    """Where the limits cannot be raised, as in a sandbox, the engine must not try."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard == resource.RLIM_INFINITY or hard >= 1 << 20:
        return []
    return [Ulimit(name="nofile", soft=1024, hard=hard), Ulimit(name="nproc", soft=4096, hard=4096)]


def wait_until(predicate: Callable[[], object], timeout: float, pause: float = 0.2) -> float:
    """The seconds that it took."""
    start = time.monotonic()
    while not predicate():
        if time.monotonic() - start > timeout:
            raise TimeoutError(f"not so after {timeout} s: {getattr(predicate, '__name__', predicate)}")
        time.sleep(pause)
    return time.monotonic() - start


def build(folder: Path, tag: str, **arguments: str) -> str:
    options = [option for name, value in arguments.items() for option in ("--build-arg", f"{name}={value}")]
    subprocess.run([ENGINE, "build", "-q", *BUILD_OPTIONS, *options, "-t", tag, str(folder)], check=True)
    return tag


class Container:
    """One container; `volume` holds its data and outlives it."""

    def __init__(self, image: str = IMAGE, volume: str | None = None, **options: Any) -> None:
        self.volume = volume or f"pg_autoembed_test_{uuid4().hex[:12]}"
        environment = {"POSTGRES_PASSWORD": PASSWORD, **options.pop("environment", {})}
        mounts: dict[str, Any] = {self.volume: {"bind": DATA, "mode": "rw"}}
        mounts |= {source: {"bind": target, "mode": "rw"} for source, target in options.pop("mounts", {}).items()}
        self.user = environment.get("POSTGRES_USER", "postgres")
        self.database = environment.get("POSTGRES_DB", self.user)
        self.testcontainer = DockerContainer(image).with_exposed_ports(5432)
        self.testcontainer.env = {name: value for name, value in environment.items() if value is not None}
        self.testcontainer.volumes = mounts
        self.testcontainer.with_command(options.pop("command", None))
        for path in options.pop("tmpfs", ()):
            self.testcontainer.with_tmpfs_mount(path)
        self.testcontainer.with_kwargs(ulimits=ulimits(), **options)
        self.started = time.monotonic()
        self.testcontainer.start()

    @property
    def docker(self) -> Any:
        return self.testcontainer.get_wrapped_container()

    @property
    def running(self) -> bool:
        self.docker.reload()
        return bool(self.docker.status == "running")

    @property
    def log(self) -> str:
        return str(self.docker.logs().decode())

    def run(self, *command: str, user: str | None = None) -> tuple[int, str]:
        """Exit status and output."""
        status, output = self.docker.exec_run(list(command), user=user or "")
        return int(status), str((output or b"").decode()).strip()

    def sql(self, statement: str, database: str | None = None) -> str:
        """As psql prints it, without ornaments."""
        options = ["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-U", self.user, "-d", database or self.database]
        status, output = self.run("psql", *options, "-c", statement)
        assert status == 0, output
        return output

    def connect(self, password: str = PASSWORD) -> psycopg.Connection[tuple[Any, ...]]:
        """From outside, as applications do."""
        host, port = self.testcontainer.get_container_host_ip(), int(self.testcontainer.get_exposed_port(5432))
        return psycopg.connect(
            host=host, port=port, user=self.user, password=password, dbname=self.database, autocommit=True
        )

    def health(self) -> tuple[bool, str]:
        """What the image's own HEALTHCHECK says, run as the engine runs it."""
        kind, *command = self.docker.attrs["Config"]["Healthcheck"]["Test"]
        assert kind == "CMD"
        status, output = self.run(*command)
        return status == 0, output

    def answers(self) -> bool:
        return self.running and self.run("pg_isready", "-q", "-h", "127.0.0.1")[0] == 0

    def is_healthy(self) -> bool:
        assert self.running, self.log
        return self.health()[0]

    def wait_until_healthy(self, timeout: float = HEALTHY_WITHIN) -> float:
        """The seconds since the container was started."""
        try:
            wait_until(self.is_healthy, timeout)
        except TimeoutError:
            raise TimeoutError(f"{self.health()[1]}\n{self.log}") from None
        return time.monotonic() - self.started

    def start_again(self) -> None:
        self.docker.start()
        self.wait_until_healthy()

    def remove(self) -> None:
        self.docker.remove(force=True)

    def destroy(self) -> None:
        self.remove()
        docker.from_env().volumes.get(self.volume).remove()
