"""Models that the postmaster loads once for all its backends, which inherit them copy-on-write.

The library in preload/ runs `start` in the postmaster, before its first fork. What holds there: one thread, no parallel
operation, no CUDA, or every backend would hang or fail at its first one. `take` is for the backends.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from autoembed import API_VERSION, batching, memory, models, offline, settings, signals, vectors
from autoembed.device import resolve
from autoembed.errors import ApiMismatch, AutoembedError, BrokenModel

if TYPE_CHECKING:
    from autoembed.encoder import Encoder
    from autoembed.models import Model
    from autoembed.settings import Settings

KEY = "autoembed preload"
VARIABLE = "EMBEDDING_PRELOAD"
# Libraries read these when they are imported. A thread of the postmaster's is a lock that its children find held.
ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1"}
PROCESS = Path("/proc/self")
HUGE_PAGE = 2 << 20
MADV_COLLAPSE = 25

Say = Callable[[str], object]


@dataclasses.dataclass
class Preloaded:
    """What the postmaster has loaded, and why not what it has not. `threads` is what torch would use by itself."""

    postmaster: int
    threads: int = 1
    seconds: float = 0.0
    encoders: dict[str, Encoder] = dataclasses.field(default_factory=dict)
    problems: dict[str, str] = dataclasses.field(default_factory=dict)


class Inherited:
    """A preloaded encoder in a backend. Closing it gives back what this backend added: the weights are shared."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def close(self) -> None:
        self._encoder.rest()


# --- in the postmaster ---------------------------------------------------------------------------------------------


def start(gd: dict[str, Any], log: Say, warn: Say, api_version: int) -> None:
    """Load what EMBEDDING_PRELOAD names. What cannot be loaded is a warning: the server starts all the same."""
    if api_version != API_VERSION:
        raise ApiMismatch(sql=api_version, package=API_VERSION)
    started = time.monotonic()
    loaded = gd[KEY] = Preloaded(os.getpid())
    try:
        wanted = settings.read()
    except AutoembedError as error:
        loaded.problems = dict.fromkeys(names(), str(error))
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
            prepare(loaded)
            model = models.find(wanted, name)
            device = backends_device(wanted.device)
            loaded.encoders[name] = load(model, dataclasses.replace(wanted, device="cpu", threads=1), device)
        except Exception as error:  # noqa: BLE001 -- whatever it is, the server must start
            kind = "" if isinstance(error, AutoembedError) else f"{type(error).__name__}: "
            loaded.problems[name] = f"{kind}{error}"
            warn(f"embedding model {name} was not preloaded: {kind}{error}")
        else:
            milliseconds = 1000 * (time.monotonic() - started)
            about = f"fingerprint {model.fingerprint[:12]}, {model.bytes // models.MEGABYTE} MB, {milliseconds:.0f} ms"
            log(f"embedding model {name} is preloaded: {about}")


@signals.kept()
def prepare(loaded: Preloaded) -> None:
    """Before the first model: torch with one thread."""
    offline.set_environment()
    os.environ.update(ENVIRONMENT)
    import torch

    import autoembed.session  # noqa: F401 -- what a session imports first

    if torch.get_num_threads() > 1:
        loaded.threads = torch.get_num_threads()
        torch.set_num_threads(1)


def load(model: Model, wanted: Settings, device: str) -> Encoder:
    """On the CPU, the encoder that runs on the device. A first text leaves behind what libraries import with it."""
    if device == "cpu":
        encoder = models.load(model, wanted)
    else:
        from autoembed.st_encoder import StEncoder

        models.check_files(model)
        encoder = StEncoder.load(model, wanted, "cpu")
    (outcome,) = batching.encode_all(encoder, ["warm"], prompt="", checkpoint=lambda: None)
    if isinstance(outcome, batching.Failure):
        raise BrokenModel(name=model.name, reason=outcome.message)
    vectors.to_text(outcome.values)
    encoder.rest()
    return encoder


def backends_device(wanted: str) -> str:
    """Which device the backends will use. CUDA does not survive a fork: a child asks for it."""
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
    """Into huge pages, where the kernel can (Linux 6.1). A fork copies an entry for each page, a connection forks."""
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is None:
        return
    for start, end in heaps():
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_COLLAPSE)


def heaps() -> Iterator[tuple[int, int]]:
    """This process's own memory, as whole huge pages."""
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


# --- in a backend --------------------------------------------------------------------------------------------------


def take(gd: dict[str, Any], model: Model, current: Settings) -> Encoder | None:
    """The postmaster's encoder of this very model, on this session's device; None where there is none."""
    loaded: Preloaded | None = gd.get(KEY)
    encoder = loaded.encoders.get(model.name) if loaded else None
    if loaded is None or encoder is None or encoder.model != model:
        return None
    models.check_files(model)  # as loading does: its files may have been written over
    return wake(loaded, encoder, current)


def wake(loaded: Preloaded, encoder: Encoder, current: Settings) -> Encoder | None:
    """Threads and devices begin after the fork."""
    import torch

    torch.set_num_threads(current.threads or loaded.threads)
    encoder.use_threads(current.threads)
    device = resolve(current.device)
    if device == encoder.device:
        return cast("Encoder", Inherited(encoder))
    move = getattr(encoder, "move", None)
    if move is None:
        return None
    del loaded.encoders[encoder.model.name]  # this session's own from now on
    move(device)
    return encoder


# --- for people ----------------------------------------------------------------------------------------------------


def annotate(gd: dict[str, Any], rows: Sequence[tuple[str, str | None, str]]) -> list[tuple[str, str | None, str]]:
    """The settings as they are reported, and of EMBEDDING_PRELOAD what came of it."""
    return [
        (name, value, f"{source}; {describe(gd)}" if name == VARIABLE and value else source)
        for name, value, source in rows
    ]


def describe(gd: dict[str, Any]) -> str:
    loaded: Preloaded | None = gd.get(KEY)
    if loaded is None:
        return "nothing is preloaded, since shared_preload_libraries has no autoembed_preload that works"
    found = [f"{name} not loaded: {problem}" for name, problem in loaded.problems.items()]
    if loaded.encoders:
        found.insert(0, f"loaded by the postmaster in {loaded.seconds:.1f} s: {', '.join(loaded.encoders)}")
    return "; ".join(found)


def names(environ: Mapping[str, str] = os.environ) -> list[str]:
    return [name.strip() for name in environ.get(VARIABLE, "").split(",") if name.strip()]
