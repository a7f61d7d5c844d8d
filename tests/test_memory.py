"""Out of memory under a limit that the kernel enforces on the backend, with an encoder that really allocates."""

from __future__ import annotations

import dataclasses
import re
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from autoembed.models import manifest as manifests
from models_for_tests import memory_hungry
from support.rigging import Rig, fill, leftovers, pending, rows, scalar
from support.server import Connection, Server

pytest_plugins = ["support.rig"]

Knowledge = Callable[..., str]
MIB = 2**20
LEEWAY = 64 * MIB
"""What the backend may still allocate: the activations of a micro-batch of 1024 tokens, and of no longer text."""


@pytest.fixture
def server(rig: Rig) -> Server:
    return rig.server


@pytest.fixture
def hungry(rig: Rig, model_dir: Path, tmp_path: Path) -> str:
    """Registered as by `model add`, which would take its time to try it out."""
    name = "memory-hungry"
    if not (rig.models / name).exists():
        folder = memory_hungry(tmp_path, name)
        manifest = dataclasses.replace(
            manifests.read(model_dir / "all-MiniLM-L6-v2"),
            name=name,
            dimensions=64,
            max_tokens=4096,
            position_limit=4096,
            files=manifests.hash_files(folder, list(manifests.paths(folder))),
        )
        manifests.write(folder, manifest)
        folder.rename(rig.models / name)
    return name


def declare(db: Connection, knowledge: Knowledge, model: str) -> None:
    """Whole micro-batches are filled first: the session has its model, its threads and their buffers."""
    knowledge(texts=["word " * 199 + str(number) for number in range(16)], dimensions=64)
    db.execute("select embed_column('knowledge', 'content'::name, model => %s::text)", [model])
    assert fill(db) == (16, 0, 0)


def limit_memory(connection: Connection, leeway: int) -> None:
    pid = connection.info.backend_pid
    found = re.search(r"VmData:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    resource.prlimit(pid, resource.RLIMIT_DATA, (int(found[1]) * 1024 + leeway, resource.RLIM_INFINITY))


def add(db: Connection, words: int, count: int = 1) -> None:
    db.execute(
        "insert into knowledge (content) select repeat('word ', %s::int - 1) || n from generate_series(1, %s) n",
        [words, count],
    )


def test_batch_that_does_not_fit_is_halved(db: Connection, knowledge: Knowledge, rig: Rig, hungry: str) -> None:
    declare(db, knowledge, hungry)
    add(db, 200, 32)
    limit_memory(db, LEEWAY * 3 // 4)
    rig.reset()
    assert fill(db) == (32, 0, 0)
    sizes = [texts for _, texts in rig.encodings()]
    assert sizes[0] == 5 > sizes[-1]  # five of them are 1024 tokens
    assert leftovers(db) == {}


def test_batch_that_leaves_the_server_itself_no_memory_is_halved(
    db: Connection, knowledge: Knowledge, rig: Rig
) -> None:
    """The look for a cancel, amid a pass, fails as the server's own error or as Python's: both mean the pass."""
    knowledge(texts=["warm"])
    db.execute("select embed_column('knowledge', 'content'::name, model => 'stub-384')")
    assert fill(db) == (1, 0, 0)
    db.execute("insert into knowledge (content) select 'hoardword ' || n from generate_series(1, 8) n")
    limit_memory(db, LEEWAY)
    rig.reset()
    assert fill(db) == (8, 0, 0)
    sizes = [texts for _, texts in rig.encodings()]
    assert sizes[0] == 8 > sizes[-1]
    assert leftovers(db) == {}


def test_text_that_does_not_fit_alone_fails_and_the_others_do_not(
    db: Connection, knowledge: Knowledge, rig: Rig, hungry: str
) -> None:
    declare(db, knowledge, hungry)
    add(db, 20, 8)
    add(db, 3000)
    add(db, 20, 8)
    limit_memory(db, LEEWAY)
    started = scalar(db, "select pg_postmaster_start_time()")
    assert fill(db) == (16, 1, 0)
    assert rows(db, "select kind, message, attempts from embedding_failures") == [
        ("memory", "there is not enough memory to encode this text", 1)
    ]
    assert pending(db) == 1
    assert fill(db) == (0, 0, 0)
    assert scalar(db, "select pg_postmaster_start_time()") == started
    limit_memory(db, 1024 * MIB)
    db.execute("update autoembed.failure set next_try = now()")
    assert fill(db) == (1, 0, 0)
    assert leftovers(db) == {}
