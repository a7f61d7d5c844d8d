"""The interface is settled: a change of it is a change of tests/golden/interface.txt, which `make golden` writes."""

from __future__ import annotations

import os
from pathlib import Path

from support.interface import interface
from support.server import Server

GOLDEN = Path(__file__).parent / "golden" / "interface.txt"


def test_interface_is_the_one_that_was_agreed(server: Server) -> None:
    with server.connect() as connection:
        found = interface(connection)
    if written := os.environ.get("AUTOEMBED_GOLDEN"):
        Path(written).write_text(found, encoding="utf-8")
    else:
        assert found == GOLDEN.read_text(encoding="utf-8"), "the interface is another one: see `make golden`"
