"""What the benchmarks print and keep: tables, and the machine that they ran on."""

import json
import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "sentence-transformers", "transformers", "tokenizers")


@dataclass(frozen=True)
class Table:
    """A section's outcome, or a part's: cells as they are printed, and the same figures as numbers for results.json.

    `published` are those that are looked for by name, at the top of the file.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    figures: dict[str, Any] = field(default_factory=dict)
    part: str = ""
    published: dict[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.columns, *self.rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in self.all_rows()
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([self.title, *(f"  {line}".rstrip() for line in lines), *(f"  {note}" for note in self.notes)])

    def markdown(self) -> str:
        first, *rest = (f"| {' | '.join(row)} |" for row in self.all_rows())
        rule = "|---" + "|--:" * (len(self.columns) - 1) + "|"
        return "\n".join([f"**{self.title}**", "", first, rule, *rest, "", *(f"{note}  " for note in self.notes)])

    def all_rows(self) -> Sequence[tuple[str, ...]]:
        return [self.columns, *self.rows]


def machine() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cpu_name()}, {cores} cores, {memory_gib()} GiB, {system_name()}"


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def memory_gib() -> int:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)


def system_name() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        return platform.system()


def packages() -> str:
    return ", ".join(f"{name} {found}" for name in PACKAGES if (found := installed(name)))


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def state_folder() -> Path:
    """Where results and what is worth keeping between runs go; never into a commit."""
    named = os.environ.get("AUTOEMBED_STATE")
    private = ROOT / ".pg"
    folder = Path(named) if named else private if private.exists() else ROOT / "build"
    (folder / "bench").mkdir(parents=True, exist_ok=True)
    return folder / "bench"


def keep(section: str, table: Table) -> Path:
    """Adds to the results of former runs, so that a section can be measured again alone."""
    file = state_folder() / "results.json"
    former = json.loads(file.read_text()) if file.exists() else {}
    found = table.figures | {"notes": table.notes}
    details = {section: {table.part: found} if table.part else found}
    former = former if "details" in former else {}
    results = json.dumps(merged(former, table.published | {"details": details}), indent=2) + "\n"
    file.write_text(results)
    with suppress(OSError):  # a checkout that others own
        (ROOT / "bench" / "results.json").write_text(results)
    return file


def merged(former: dict[str, Any], latter: dict[str, Any]) -> dict[str, Any]:
    """Deeply, as far as the keys of the published figures go."""
    deep = {
        key: merged(former[key], value) if isinstance(value, dict) and isinstance(former.get(key), dict) else value
        for key, value in latter.items()
    }
    return former | deep
