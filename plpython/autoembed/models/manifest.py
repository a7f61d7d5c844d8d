"""The manifest: what `model add` wrote down about a model, beside its files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

FILE = "autoembed.json"
FORMAT = 1

# Copied for their readers; they decide no vector and so are no part of the fingerprint.
DOCUMENTS = ("README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")

TYPES = {
    **dict.fromkeys(("name", "architecture", "precision", "encoder", "encoder_note"), str),
    **dict.fromkeys(("dimensions", "max_tokens", "position_limit"), int),
    **dict.fromkeys(("converted", "assumed"), list),
    "normalizes": bool,
    "prompts": dict,
}
"""What a field must be: manifests are changed by hand, and written by later versions."""


class BadManifest(Exception):
    """The manifest cannot be read; the message says why."""


@dataclass(frozen=True)
class Stamp:
    """A Stamp changes when its file does, as in git's index: equal stamps spare hashing hundreds of megabytes."""

    size: int
    inode: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        status = path.stat()
        return cls(status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)


@dataclass(frozen=True)
class File:
    sha256: str
    stamp: Stamp


@dataclass(frozen=True)
class Origin:
    """An Origin says where a model came from: the hashes tell whether the same thing is added again."""

    source: str
    revision: str | None
    options: dict[str, Any]
    files: dict[str, str]


@dataclass(frozen=True)
class Manifest:
    name: str
    architecture: str
    precision: str
    dimensions: int
    max_tokens: int
    position_limit: int
    normalizes: bool
    prompts: dict[str, str]
    default_prompt: str | None
    origin: Origin
    converted: list[str]
    assumed: list[str]
    tools: dict[str, str]
    added: str
    files: dict[str, File] = field(default_factory=dict)
    encoder: str = "sentence-transformers"
    """Which encoder serves it; both give the same vectors, so this is no part of the fingerprint."""
    encoder_note: str = ""

    @property
    def weights(self) -> int:
        return sum(file.stamp.size for name, file in self.files.items() if name.endswith(".safetensors"))

    def fingerprint(self, max_tokens: int) -> str:
        """Returns a SHA-256 over all that decides a vector."""
        decides = {
            "files": {name: file.sha256 for name, file in self.files.items() if name not in DOCUMENTS},
            "precision": self.precision,
            "max_tokens": max_tokens,
            "prompts": self.prompts,
            "default_prompt": self.default_prompt,
        }
        canonical = json.dumps(decides, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def read(folder: Path) -> Manifest:
    """Reads the manifest. Raises FileNotFoundError, BadManifest, or another OSError."""
    try:
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except ValueError:
        raise BadManifest(f"{FILE} is not JSON") from None
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise BadManifest(f"{FILE} is not of format {FORMAT}, which this version reads")
    try:
        return _from_json(content)
    except (TypeError, KeyError, AttributeError):
        raise BadManifest(f"{FILE} is incomplete or damaged") from None


def _from_json(content: dict[str, Any]) -> Manifest:
    missing = {each.name for each in fields(Manifest) if each.name not in ("encoder", "encoder_note")} - content.keys()
    if missing:
        raise KeyError(missing)
    files = {name: File(each["sha256"], Stamp(**each["stamp"])) for name, each in content.pop("files").items()}
    manifest = Manifest(origin=Origin(**content.pop("origin")), files=files, **content)
    if not all(isinstance(each, int) for file in files.values() for each in asdict(file.stamp).values()):
        raise TypeError("stamps are numbers")
    for name, kind in TYPES.items():
        if not isinstance(getattr(manifest, name), kind):
            raise TypeError(name)
    return manifest


def write(folder: Path, manifest: Manifest) -> None:
    """Writes it atomically, so that no reader ever sees half of it."""
    content = json.dumps({"format": FORMAT, **asdict(manifest)}, indent=2, ensure_ascii=False) + "\n"
    temporary = folder / f".{FILE}.{os.getpid()}"
    try:
        temporary.write_text(content, encoding="utf-8")
        temporary.chmod(0o644)
        temporary.replace(folder / FILE)
    finally:
        temporary.unlink(missing_ok=True)


def paths(folder: Path) -> Iterator[str]:
    """Returns all files of a model, relative to its folder, without the manifest itself."""
    for directory, _, names in os.walk(folder):
        for name in names:
            relative = (Path(directory) / name).relative_to(folder).as_posix()
            if relative != FILE and not relative.startswith(f".{FILE}."):
                yield relative


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_files(folder: Path, names: Iterable[str]) -> dict[str, File]:
    """Hashes and stamps files; the stamp is taken first, so that a change during hashing shows later."""
    files = {}
    for name in sorted(names):
        stamp = Stamp.of(folder / name)
        files[name] = File(sha256(folder / name), stamp)
    return files
