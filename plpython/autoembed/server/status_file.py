"""What a backend with a loaded model tells the others: a small file of its own in the server's data directory.

Its name says whose it is, by pid and by the time at which that process started: a file of a process that is gone is
removed by the next one that looks. It names models and counts texts; it never holds one.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

DIRECTORY = Path("pg_stat_tmp")
"""Relative to the data directory, in which a backend works; left out of base backups."""
PREFIX = "autoembed"
HEAD = struct.Struct("<II")
SIZE = 4096
TRIES = 5
PROC = Path("/proc")


class StatusFile:
    """This backend's own file, there while something is loaded. Written in place: no more than a system call."""

    def __init__(self, directory: Path = DIRECTORY) -> None:
        self.directory = directory.absolute()
        self.path: Path | None = None
        self.file = -1

    def write(self, entries: list[dict[str, Any]]) -> None:
        """Writes what is loaded. A session that cannot write it is not shown, and works all the same."""
        with suppress(OSError):
            if not entries:
                self.close()
            else:
                self.open()
                os.pwrite(self.file, pack(entries), 0)

    def open(self) -> None:
        if self.path is None:
            sweep(self.directory)
            path = self.directory / name_of(os.getpid())
            self.file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            self.path = path

    def close(self) -> None:
        if self.path is not None:
            os.close(self.file)
            path, self.path, self.file = self.path, None, -1
            path.unlink(missing_ok=True)


def pack(entries: list[dict[str, Any]]) -> bytes:
    while len(body := json.dumps(entries).encode()) > SIZE - HEAD.size:
        entries = entries[1:]
    return HEAD.pack(len(body), zlib.crc32(body)) + body


def unpack(page: bytes) -> list[dict[str, Any]] | None:
    """Returns a page's entries; None where it is not whole: its owner is writing it."""
    if len(page) < HEAD.size:
        return None
    length, checksum = HEAD.unpack_from(page)
    body = page[HEAD.size : HEAD.size + length]
    if zlib.crc32(body) != checksum:
        return None
    entries: list[dict[str, Any]] = json.loads(body)
    return entries


def read_entries(path: Path) -> list[dict[str, Any]]:
    for _ in range(TRIES):
        with suppress(OSError):
            entries = unpack(path.read_bytes())
            if entries is not None:
                return entries
    return []


def pages(directory: Path = DIRECTORY) -> Iterator[tuple[int, Path]]:
    """Yields those of living processes, with their pids; the others' are removed on the way."""
    for path in directory.glob(f"{PREFIX}.*"):
        with suppress(OSError, ValueError):
            pid = int(path.name.split(".")[1])
            if path.name == name_of(pid):
                yield pid, path
            else:
                path.unlink(missing_ok=True)


def sessions(visible: Collection[int], directory: Path = DIRECTORY) -> list[dict[str, Any]]:
    """Returns what these sessions have loaded, with their memory."""
    found = []
    for pid, path in pages(directory):
        if pid in visible:
            private, shared = memory_of(pid)
            about = {"pid": pid, "private_bytes": private, "shared_bytes": shared}
            found += [about | entry for entry in read_entries(path)]
    return found


def sweep(directory: Path) -> None:
    for _ in pages(directory):
        pass


def name_of(pid: int) -> str:
    return f"{PREFIX}.{pid}.{started(pid)}"


def started(pid: int) -> str:
    """Returns ticks since boot; '' where the system does not tell, 'gone' where there is no such process."""
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        if PROC.joinpath("self").exists():
            return "gone"
    try:
        os.kill(pid, 0)
    except OSError:
        return "gone"
    return ""


def memory_of(pid: int) -> tuple[int | None, int | None]:
    """Returns the bytes that are the process's alone, and those that it shares or could read again from a file."""
    try:
        lines = (PROC / str(pid) / "smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return None, None
    sizes = {name: int(rest.split()[0]) << 10 for name, _, rest in (line.partition(":") for line in lines)}
    private = sizes["Private_Dirty"]
    return private + sizes.get("Swap", 0), sizes["Rss"] - private
