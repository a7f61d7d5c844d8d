"""The plugin with the rig's fixtures. A test module asks for it by `pytest_plugins = ["support.rig"]`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.rigging import CRON, Rig
from support.server import Connection, Server, pg_config
from support.stubs import add_stub


def make_rig(directory: Path, base: dict[str, str], settings: dict[str, object]) -> Rig:
    rig = Rig(directory)
    for name, dimensions in (("stub-384", 384), ("stub-other", 384), ("stub-16", 16)):
        add_stub(rig.models, name, dimensions=dimensions)
    rig.server = Server(directory / "server", rig.environment(base), settings)
    rig.server.create()
    return rig


@pytest.fixture(scope="session")
def shared_rig(backend_coverage: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    rig = make_rig(tmp_path_factory.mktemp("rigs") / "shared", backend_coverage, {"max_connections": 50})
    yield rig
    rig.server.destroy()


@pytest.fixture
def rig(shared_rig: Rig) -> Iterator[Rig]:
    """The shared rig, with nothing wrong yet. A module that fills it overrides `server` with the rig's."""
    shared_rig.reset()
    yield shared_rig
    shared_rig.reset()


@pytest.fixture
def own_rig(backend_coverage: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., Rig]]:
    """own_rig(settings={...}): a rig of the test's own, durable and free to crash."""
    made: list[Rig] = []

    def make(settings: dict[str, object] | None = None) -> Rig:
        options = {"fsync": "on", "restart_after_crash": "on", **(settings or {})}
        made.append(make_rig(tmp_path / f"rig{len(made)}", backend_coverage, options))
        return made[-1]

    yield make
    for each in made:
        each.reset()
        each.server.destroy()


@pytest.fixture
def declared(db: Connection, knowledge: Callable[..., str]) -> Callable[..., str]:
    """As knowledge, and the column is declared."""

    def make(count: int = 5, **options: object) -> str:
        name = knowledge(count, **options)
        db.execute("select embed_column(%s::regclass, 'content'::name)", [name])
        return name

    return make


@pytest.fixture(scope="module")
def make_module_rig(
    backend_coverage: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Rig]]:
    """make_module_rig({...}, EMBEDDING_X="..."): a rig for all tests of a module, with settings of its own."""
    made: list[Rig] = []

    def make(settings: dict[str, object], **environment: str) -> Rig:
        made.append(make_rig(tmp_path_factory.mktemp("rigs") / "module", backend_coverage | environment, settings))
        return made[-1]

    yield make
    for each in made:
        each.server.destroy()


@pytest.fixture(scope="module")
def make_cron_rig(make_module_rig: Callable[..., Rig]) -> Callable[..., Rig]:
    """As make_module_rig, with pg_cron, whose own database is the rig's."""

    def make(settings: dict[str, object] | None = None, **environment: str) -> Rig:
        control = pg_config("--sharedir") / "extension" / "pg_cron.control"
        assert control.exists(), "pg_cron is not installed: `make dev` gets Debian's"
        rig = make_module_rig(CRON | (settings or {}), **environment)
        with rig.server.connect() as connection:
            connection.execute("create extension pg_cron")
        return rig

    return make


@pytest.fixture(scope="module")
def module_rig(make_module_rig: Callable[..., Rig]) -> Rig:
    """A rig for a module whose tests crash it. What is not flushed at a commit is lost in a crash."""
    return make_module_rig({"restart_after_crash": "on", "wal_writer_delay": "10s", "max_connections": 30})
