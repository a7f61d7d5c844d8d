"""Fixtures: containers that go with their test, and one that the tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import docker  # type: ignore[import-untyped]
import pytest

from image.containers import Container


def pytest_configure(config: pytest.Config) -> None:
    """testcontainers and docker leave their connections to the garbage collector."""
    warning = "ignore:Exception ignored in. <socket.socket:pytest.PytestUnraisableExceptionWarning"
    config.addinivalue_line("filterwarnings", warning)


@pytest.fixture
def make() -> Iterator[Callable[..., Container]]:
    """make(image=…, volume=…, environment={…}, mounts={…}, …): a container; what is left of it goes after the test."""
    made: list[Container] = []

    def start(**options: Any) -> Container:
        made.append(Container(**options))
        return made[-1]

    yield start
    client = docker.from_env()
    for container in made:
        for left in client.containers.list(all=True, filters={"id": container.docker.id}):
            left.remove(force=True)
    for volume in {container.volume for container in made}:
        client.volumes.get(volume).remove()


@pytest.fixture(scope="session")
def shared() -> Iterator[Container]:
    """As `docker run -e POSTGRES_PASSWORD=… IMAGE` makes it. Tests use databases of their own in it."""
    container = Container()
    try:
        container.wait_until_healthy()
        yield container
    finally:
        container.destroy()
