"""Looks at a published folder's files before anything is made of them: are they readable, whole, what they are named?

Most folders that fail were downloaded by halves: without Git-LFS the weights are text files of three lines.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from autoembed.errors import BrokenModel, UnreadableModel
from autoembed.models import layout as layouts
from autoembed.models.layout import Layout
from autoembed.models.manifest import DOCUMENTS

LENGTH = 8
"""So many bytes of a safetensors file say how long its header is."""
LONGEST_HEADER = 100_000_000
FIRST = 4096


def check(layout: Layout) -> None:
    """Refuses a folder with a damaged file."""
    for name in layouts.needed_files(layout):
        path = layout.folder / name
        with reading(path):
            problem = _problem(path)
        if problem:
            raise BrokenModel(name=layout.name, reason=f"{name} {problem}", hint=layouts.DOWNLOAD)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raises UnreadableModel for what the system says while a published folder is read."""
    try:
        yield
    except OSError as error:
        where = Path(error.filename) if error.filename else path
        raise UnreadableModel(path=where, reason=error.strerror or error, hint=layouts.READABLE) from None


def _problem(path: Path) -> str | None:
    with path.open("rb") as stream:
        beginning = stream.read(FIRST)
    if not beginning and path.name not in DOCUMENTS:
        return "is empty"
    if beginning.startswith(layouts.POINTER):
        return layouts.IS_POINTER
    return _cut_off(path) if path.suffix == ".safetensors" else None


def _cut_off(path: Path) -> str | None:
    """Returns how much is missing; the header says where the last tensor ends."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(LENGTH), "little")
        if not 2 <= length <= LONGEST_HEADER:
            return "is no safetensors file"
        header = stream.read(length)
    if len(header) < length:
        return f"is cut off: it has {size} bytes, and its header alone takes {LENGTH + length}"
    try:
        tensors = [each for name, each in json.loads(header).items() if name != "__metadata__"]
        end = LENGTH + length + max((int(each["data_offsets"][1]) for each in tensors), default=0)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        return "is no safetensors file"
    return f"is cut off: it has {size} bytes of {end}" if size < end else None
