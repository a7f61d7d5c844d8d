"""Memory back to the operating system: glibc keeps what a run has freed, hundreds of megabytes of it."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def trim() -> None:
    gc.collect()
    free_mkl()
    trim_heap = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim_heap is not None:
        trim_heap(0)


def free_mkl() -> None:
    """Frees what MKL keeps: a buffer for each size and thread of the products that it has computed.

    It is a part of torch's own library, where torch has it at all.
    """
    torch = sys.modules.get("torch")
    library = Path(str(torch.__file__)).with_name("lib") / "libtorch_cpu.so" if torch else None
    if library is not None and library.exists():
        free = getattr(ctypes.CDLL(str(library)), "mkl_serv_free_buffers", None)
        if free is not None:
            free()


@contextmanager
def uncollected() -> Iterator[None]:
    """Searches for no garbage meanwhile.

    As libraries are imported some hundred thousand objects come that all stay, and to look through them again and again
    takes a tenth of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
