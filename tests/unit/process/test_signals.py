from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterator

import pytest

from autoembed.process.signals import kept

HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)


@pytest.fixture
def received() -> Iterator[list[int]]:
    """What a handler of SIGHUP that C has set, as PostgreSQL sets its own, has received."""
    libc, received = ctypes.CDLL(None), list[int]()
    libc.signal.restype = ctypes.c_void_p
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    handler = HANDLER(received.append)
    former = libc.signal(signal.SIGHUP, ctypes.cast(handler, ctypes.c_void_p))
    yield received
    libc.signal(signal.SIGHUP, former)


def take() -> None:
    """As a library does."""
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal(signal.SIGHUP, int(signal.SIG_IGN))


def take_and_fail() -> None:
    take()
    raise ImportError


def test_a_library_takes_no_signal(received: list[int]) -> None:
    with kept():
        take()
        os.kill(os.getpid(), signal.SIGHUP)
        assert received == []
    os.kill(os.getpid(), signal.SIGHUP)
    assert received == [signal.SIGHUP]


def test_nor_when_its_import_fails(received: list[int]) -> None:
    with pytest.raises(ImportError), kept():
        take_and_fail()
    os.kill(os.getpid(), signal.SIGHUP)
    assert received == [signal.SIGHUP]
