"""Models that the postmaster loads once for all its backends, which inherit them copy-on-write.

The library in preload/ runs `start` in the postmaster, before its first fork. What holds there: one thread, no parallel
operation, no CUDA, or every backend would hang or fail at its first one. `take` is for the backends.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoembed import API_VERSION, models, offline, settings
from autoembed.errors import ApiMismatch, AutoembedError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from autoembed.encoder import Encoder, Tokenized
    from autoembed.models import Model
    from autoembed.settings import Settings

KEY = "autoembed preload"
VARIABLE = "EMBEDDING_PRELOAD"
# Libraries read these when they are imported. A thread of the postmaster's is a lock that its children find held.
ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1"}
TASKS = Path("/proc/self/task")

Warn = Callable[[str], object]


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
        self.model = encoder.model
        self.device = encoder.device
        self.max_texts = encoder.max_texts
        self.token_budget = encoder.token_budget
        self.pads = encoder.pads
        self.encoder = encoder

    def tokenize(self, texts: Sequence[str], prompt: str = "") -> list[Tokenized]:
        return self.encoder.tokenize(texts, prompt)

    def encode(self, texts: Sequence[Tokenized]) -> NDArray[np.float32]:
        return self.encoder.encode(texts)

    def rest(self) -> None:
        self.encoder.rest()

    def close(self) -> None:
        self.encoder.rest()


# --- in the postmaster ---------------------------------------------------------------------------------------------


def start(gd: dict[str, Any], warn: Warn, api_version: int) -> None:
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
    load_all(loaded, wanted, warn)
    gc.collect()
    gc.freeze()  # a collection in a backend would write to every object, and so copy it
    loaded.seconds = time.monotonic() - started
    if (tasks := count_tasks()) > 1:
        warn(f"the postmaster has {tasks} threads after preloading; backends may hang at their first embedding")


def load_all(loaded: Preloaded, wanted: Settings, warn: Warn) -> None:
    for name in wanted.preload:
        try:
            prepare(loaded)
            model = models.find(wanted, name)
            loaded.encoders[name] = load(model, dataclasses.replace(wanted, device="cpu", threads=1))
        except Exception as error:  # noqa: BLE001 -- whatever it is, the server must start
            kind = "" if isinstance(error, AutoembedError) else f"{type(error).__name__}: "
            loaded.problems[name] = f"{kind}{error}"
            warn(f"embedding model {name} was not preloaded: {kind}{error}")


def prepare(loaded: Preloaded) -> None:
    """Before the first model: torch with one thread."""
    offline.set_environment()
    os.environ.update(ENVIRONMENT)
    import torch

    import autoembed.session  # noqa: F401 -- what a session imports first

    if torch.get_num_threads() > 1:
        loaded.threads = torch.get_num_threads()
        torch.set_num_threads(1)


def load(model: Model, wanted: Settings) -> Encoder:
    """A first text leaves behind what the libraries import and compile with it."""
    encoder = models.load(model, wanted)
    encoder.encode(encoder.tokenize(["warm"]))
    encoder.rest()
    return encoder


def count_tasks() -> int:
    return len(list(TASKS.iterdir())) if TASKS.is_dir() else 1


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

    from autoembed.device import resolve

    torch.set_num_threads(current.threads or loaded.threads)
    device = resolve(current.device)
    if device == encoder.device:
        return Inherited(encoder)
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


def names() -> list[str]:
    return [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
