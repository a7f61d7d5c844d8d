"""Models from the hub, outside the server: only the files that are needed, at one recorded commit."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from autoembed.errors import AutoembedError, DownloadFailed
from autoembed.models import layout as layouts
from autoembed.models.manifest import DOCUMENTS

if TYPE_CHECKING:
    from huggingface_hub import HfApi

DEFAULT_OWNER = "sentence-transformers"
SMALL_FILES = ("*.json", "*.txt", "*.model", *DOCUMENTS)
HINT = (
    "Check the name (OWNER/NAME) and the network. Without a hub, copy the model's folder here "
    "and use `autoembed model add PATH`."
)


@dataclass(frozen=True)
class Snapshot:
    folder: Path
    repository: str
    commit: str


def repository(name: str) -> str:
    return name if "/" in name else f"{DEFAULT_OWNER}/{name}"


@contextmanager
def download(name: str, revision: str | None) -> Iterator[Snapshot]:
    """Keeps the model's files for as long as the context lasts."""
    with tempfile.TemporaryDirectory(prefix="autoembed-") as folder:
        try:
            snapshot = _fetch(repository(name), revision, Path(folder))
        except AutoembedError:
            raise
        except Exception as error:  # whatever the hub's client and the network come up with
            raise DownloadFailed(name=name, reason=_first_line(error), hint=HINT) from error
        yield snapshot


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def client() -> HfApi:
    from huggingface_hub import HfApi

    return HfApi()


def _fetch(repo: str, revision: str | None, folder: Path) -> Snapshot:
    api = client()
    found = api.model_info(repo, revision=revision)
    commit = str(found.sha)
    files = [str(sibling.rfilename) for sibling in found.siblings or []]
    _get(api, repo, commit, folder, [file for file in files if _is_small(file)])
    layout = layouts.inspect(folder, repo)
    weights = [file for module in layout.modules if module.has_weights for file in _weights(files, module.path)]
    _get(api, repo, commit, folder, weights)
    return Snapshot(folder, repo, commit)


def _get(api: HfApi, repo: str, commit: str, folder: Path, files: list[str]) -> None:
    if files:  # no pattern at all would mean every file
        api.snapshot_download(repo, revision=commit, local_dir=folder, allow_patterns=files)


def _is_small(file: str) -> bool:
    """Tells whether it is no weights, one folder deep at most, where modules live, and of no other framework."""
    path = PurePosixPath(file)
    exports = ("onnx", "openvino")
    return len(path.parts) <= 2 and path.parts[0] not in exports and any(path.match(each) for each in SMALL_FILES)


def _weights(files: list[str], directory: str) -> list[str]:
    parent = PurePosixPath(directory)
    names = [path.name for path in map(PurePosixPath, files) if path.parent == parent]
    return [(parent / name).as_posix() for name in layouts.choose_weights(names)]
