"""Measures coverage inside the test servers' backends: the servers are started with this directory in PYTHONPATH.

PL/Python never finalises its interpreter, so Python's own atexit does not run when a backend ends; libc's on_exit does.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

TOOLS = os.environ["AUTOEMBED_TEST_TOOLS"]


def start_coverage() -> Any:
    # The directory goes again: what the product lacks must not be found there.
    sys.path.append(TOOLS)
    import coverage

    sys.path.remove(TOOLS)
    return coverage.process_startup()


measuring = start_coverage()


def save(status: int, argument: object) -> None:
    measuring.stop()
    measuring.save()


if measuring is not None:
    libc = ctypes.CDLL(None)
    at_exit = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p)(save)
    at_fork = ctypes.CFUNCTYPE(None)(lambda: libc.on_exit(at_exit, None))
    libc.on_exit(at_exit, None)
    # Run by its path, this module goes, and would take with it what libc calls.
    sys.modules["autoembed coverage"] = (at_exit, at_fork)  # type: ignore[assignment]
    # Where the postmaster has started Python, what it registers after this ends its children first: they register anew.
    getattr(libc, "__register_atfork")(None, None, at_fork, None)
