"""Checkpoints: what an encoder calls so that a cancel acts while it works."""

from __future__ import annotations

import time
from collections.abc import Callable

CHECKPOINT_SECONDS = 0.2


def nothing() -> None:
    """Does nothing: the checkpoint of a caller whom nobody interrupts."""


class Sparse:
    """Calls the checkpoint, which costs a query and a commit, only as often as a cancel must be seen."""

    def __init__(self, checkpoint: Callable[[], None]) -> None:
        self.checkpoint = checkpoint
        self.called = time.monotonic()

    def __call__(self) -> None:
        if time.monotonic() - self.called >= CHECKPOINT_SECONDS:
            self.checkpoint()
            self.called = time.monotonic()
