"""Memory back to the operating system: glibc keeps what a run has freed, hundreds of megabytes of it."""

from __future__ import annotations

import ctypes
import gc


def trim() -> None:
    gc.collect()
    trim_heap = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim_heap is not None:
        trim_heap(0)
