"""The server's signal handlers, which no library is to replace when it is loaded.

Debian's torch brings UCX along, which takes SIGHUP for its own debugging, and SIGSEGV and its like: a postmaster that
preloads would no longer read its configuration again.
"""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Iterator
from contextlib import contextmanager

ROOM = 1024  # for any system's struct sigaction


@contextmanager
def kept() -> Iterator[None]:
    """Sets all handlers back afterwards to what they were. Python itself cannot see those that C has set."""
    sigaction = ctypes.CDLL(None).sigaction
    handlers = {number: ctypes.create_string_buffer(ROOM) for number in signal.valid_signals()}
    for number, handler in handlers.items():
        sigaction(number, None, handler)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            sigaction(number, handler, None)
