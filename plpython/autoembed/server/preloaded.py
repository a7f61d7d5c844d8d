"""The models that a backend inherits from the postmaster, where autoembed_preload has loaded them (postmaster.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from autoembed.models import directory
from autoembed.process import threads
from autoembed.process.device import resolve

if TYPE_CHECKING:
    from autoembed.encoding.protocol import Encoder
    from autoembed.models.model import Model
    from autoembed.settings import Settings

KEY = "autoembed preload"
VARIABLE = "EMBEDDING_PRELOAD"


@dataclasses.dataclass
class Preloaded:
    """The models that the postmaster has loaded, and why not others. `threads` is what torch would use by itself."""

    postmaster: int
    threads: int = 1
    seconds: float = 0.0
    encoders: dict[str, Encoder] = dataclasses.field(default_factory=dict)
    problems: dict[str, str] = dataclasses.field(default_factory=dict)


def take(gd: dict[str, Any], model: Model, current: Settings) -> Encoder | None:
    """Returns the postmaster's encoder of this very model, on this session's device; None where there is none."""
    loaded: Preloaded | None = gd.get(KEY)
    encoder = loaded.encoders.get(model.name) if loaded else None
    if loaded is None or encoder is None or encoder.model != model:
        return None
    directory.check_files(model)  # as loading does: its files may have been written over
    return wake(loaded, encoder, current)


def wake(loaded: Preloaded, encoder: Encoder, current: Settings) -> Encoder | None:
    """Gives the encoder threads and its device, which begin after the fork."""
    threads.use(current.threads or loaded.threads)
    encoder.use_threads(current.threads)
    device = resolve(current.device)
    if device == encoder.device:
        return encoder
    move = getattr(encoder, "move", None)
    if move is None:
        return None
    del loaded.encoders[encoder.model.name]
    encoder.shared = False  # this session's own from now on
    move(device)
    return encoder


def annotate(gd: dict[str, Any], rows: Sequence[tuple[str, str | None, str]]) -> list[tuple[str, str | None, str]]:
    """Adds to the reported settings what came of EMBEDDING_PRELOAD."""
    return [
        (name, value, f"{source}; {report(gd)}" if name == VARIABLE and value else source)
        for name, value, source in rows
    ]


def report(gd: dict[str, Any]) -> str:
    """Returns in words what the postmaster has preloaded."""
    loaded: Preloaded | None = gd.get(KEY)
    if loaded is None:
        return "nothing is preloaded, since shared_preload_libraries has no autoembed_preload that works"
    found = [f"{name} not loaded: {problem}" for name, problem in loaded.problems.items()]
    if loaded.encoders:
        found.insert(0, f"loaded by the postmaster in {loaded.seconds:.1f} s: {', '.join(loaded.encoders)}")
    return "; ".join(found)
