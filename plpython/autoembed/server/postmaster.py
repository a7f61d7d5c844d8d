"""Loads models once in the postmaster, for all its backends, which inherit them copy-on-write.

The library in preload/ runs `start` in the postmaster, before its first fork. What holds there: one thread, no parallel
operation, no CUDA, or every backend would hang or fail at its first one.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoembed import API_VERSION, settings
from autoembed.encoding import batching, vectors
from autoembed.encoding.load import load_encoder
from autoembed.errors import ApiMismatch, AutoembedError, BrokenModel
from autoembed.models import directory
from autoembed.models.model import MEGABYTE
from autoembed.process import environment, memory, signals, threads
from autoembed.process.device import resolve
from autoembed.server.preloaded import KEY, Preloaded

if TYPE_CHECKING:
    from autoembed.encoding.protocol import Encoder
    from autoembed.models.model import Model
    from autoembed.settings import Settings

# Libraries read these when they are imported. A thread of the postmaster's is a lock that its children find held.
ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1"}
PROCESS = Path("/proc/self")
HUGE_PAGE = 2 << 20
MADV_COLLAPSE = 25

Say = Callable[[str], object]


def start(gd: dict[str, Any], log: Say, warn: Say, api_version: int) -> None:
    """Loads what EMBEDDING_PRELOAD names. What cannot be loaded is a warning: the server starts all the same."""
    if api_version != API_VERSION:
        raise ApiMismatch(sql=api_version, package=API_VERSION)
    started = time.monotonic()
    loaded = gd[KEY] = Preloaded(os.getpid())
    try:
        wanted = settings.read()
    except AutoembedError as error:
        loaded.problems = dict.fromkeys(settings.preload_names(), str(error))
        warn(f"no embedding model was preloaded: {error}")
        return
    load_all(loaded, wanted, log, warn)
    memory.trim()
    gc.freeze()  # a collection in a backend would write to every object, and so copy it
    collapse()
    loaded.seconds = time.monotonic() - started
    if (tasks := count_tasks()) > 1:
        warn(f"the postmaster has {tasks} threads after preloading; backends may hang at their first embedding")


def load_all(loaded: Preloaded, wanted: Settings, log: Say, warn: Say) -> None:
    for name in wanted.preload:
        started = time.monotonic()
        try:
            import_torch(loaded)
            model = directory.find(wanted, name)
            device = backends_device(wanted.device)
            loaded.encoders[name] = load_warm(model, dataclasses.replace(wanted, device="cpu", threads=1), device)
        except Exception as error:  # noqa: BLE001 -- whatever it is, the server must start
            kind = "" if isinstance(error, AutoembedError) else f"{type(error).__name__}: "
            loaded.problems[name] = f"{kind}{error}"
            warn(f"embedding model {name} was not preloaded: {kind}{error}")
        else:
            milliseconds = 1000 * (time.monotonic() - started)
            about = f"fingerprint {model.fingerprint[:12]}, {model.bytes // MEGABYTE} MB, {milliseconds:.0f} ms"
            log(f"embedding model {name} is preloaded: {about}")


@signals.kept()
def import_torch(loaded: Preloaded) -> None:
    """Imports torch before the first model, with one thread."""
    environment.set_environment()
    os.environ.update(ENVIRONMENT)
    import torch

    import autoembed.server.session  # noqa: F401 -- what a session imports first

    if torch.get_num_threads() > 1:
        loaded.threads = torch.get_num_threads()
        threads.use(1)


def load_warm(model: Model, wanted: Settings, device: str) -> Encoder:
    """Loads on the CPU the encoder that runs on the device, and encodes a first text: libraries import more with it."""
    if device == "cpu":
        encoder = load_encoder(model, wanted)
    else:
        from autoembed.encoding.reference import StEncoder

        directory.check_files(model)
        encoder = StEncoder.load(model, wanted, "cpu")
    (outcome,) = batching.encode_all(encoder, ["warm"], prompt="", checkpoint=lambda: None)
    if isinstance(outcome, batching.Failure):
        raise BrokenModel(name=model.name, reason=outcome.message)
    vectors.to_text(outcome.values)
    encoder.free_memory()
    encoder.shared = True
    return encoder


def backends_device(wanted: str) -> str:
    """Returns the device that the backends will use. CUDA does not survive a fork: a child asks for it."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return resolve(wanted)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, resolve(wanted).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        found = answer.read()
    os.waitpid(child, 0)
    return found or resolve("cpu")


def collapse() -> None:
    """Collapses memory into huge pages, if the kernel can (Linux 6.1): a connection's fork copies an entry a page."""
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is None:
        return
    for start, end in heaps():
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_COLLAPSE)


def heaps() -> Iterator[tuple[int, int]]:
    """Yields this process's own memory, as whole huge pages."""
    maps = PROCESS / "maps"
    for fields in map(str.split, maps.read_text().splitlines() if maps.exists() else ()):
        if fields[1] == "rw-p" and (len(fields) == 5 or fields[5] == "[heap]"):
            start, end = (int(address, 16) for address in fields[0].split("-"))
            first, last = -(-start // HUGE_PAGE) * HUGE_PAGE, end // HUGE_PAGE * HUGE_PAGE
            if first < last:
                yield first, last


def count_tasks() -> int:
    tasks = PROCESS / "task"
    return len(list(tasks.iterdir())) if tasks.is_dir() else 1
