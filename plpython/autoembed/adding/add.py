"""Models into the model directory and out of it: a model is there whole, or not at all."""

from __future__ import annotations

import errno
import fcntl
import importlib.metadata
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from autoembed.adding import convert, intact, trial
from autoembed.adding.convert import Notes, Options
from autoembed.adding.trial import Facts
from autoembed.errors import InvalidOption, ModelExists, UnknownModel, UnwritableDirectory
from autoembed.models import directory as model_directory
from autoembed.models import layout as layouts
from autoembed.models import manifest as manifests
from autoembed.models.layout import Layout
from autoembed.models.manifest import BadManifest, Manifest, Origin

LOCK = ".lock"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
RUSTS = re.compile(r"\(os error (\d+)\)")
TOOLS = ("autoembed", "torch", "transformers", "sentence-transformers", "tokenizers", "safetensors")


@dataclass(frozen=True)
class Added:
    """A model that stands in the directory; `new` is false where the same content was there already."""

    manifest: Manifest
    folder: Path
    new: bool


def add_model(
    source: Path,
    directory: Path,
    *,
    name: str | None = None,
    options: Options = Options(),  # noqa: B008 -- frozen
    force: bool = False,
    origin: tuple[str, str | None] | None = None,
) -> Added:
    """Copies, converts, tries out and registers a folder; `origin` is a source and its revision, if not the folder."""
    source = source.resolve()
    name = model_directory.check_name(name or source.name)
    with intact.reading(source):
        layout = layouts.inspect(source, name)
        convert.check_options(layout, options)
        intact.check(layout)
    with _locked(directory):
        folder = directory / name
        if source == folder.resolve():
            raise InvalidOption(option="PATH", problem="is the model directory's own copy; give --name or another PATH")
        with intact.reading(source):
            found = _origin(layout, options, origin or (str(source), None))
        if not force and (present := _same(folder, found)) is not None:
            return Added(present, folder, new=False)
        if folder.exists() and not force:
            raise ModelExists(name=name)
        return Added(_build(layout, folder, options, found), folder, new=True)


def remove_model(name: str, directory: Path) -> None:
    folder = directory / model_directory.check_name(name)
    with _locked(directory):
        if not folder.is_dir():
            raise UnknownModel(name=name, directory=directory, hint="`autoembed model list` shows what is there.")
        _discard(folder)


def _build(layout: Layout, folder: Path, options: Options, origin: Origin) -> Manifest:
    stage = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _copy(layout, stage)
        notes = convert.complete(layout, stage, options)
        layout = layouts.inspect(stage, layout.name)
        facts = trial.try_out(layout, stage)
        if options.precision != convert.FLOAT32:
            trial.change_precision(layout, facts, options.precision)
        _make_readable(stage)
        manifest = _manifest(layout, facts, notes, options, origin)
        manifests.write(stage, manifest)
        _put_in_place(stage, folder)
        return manifest
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _copy(layout: Layout, stage: Path) -> None:
    for file in layouts.needed_files(layout):
        if not layouts.is_pickled(file):
            (stage / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(layout.folder / file, stage / file)
    for module in layout.modules:
        (stage / module.path).mkdir(parents=True, exist_ok=True)


def _make_readable(stage: Path) -> None:
    """Lets everybody read it, whatever the umask: the server runs as another user."""
    stage.chmod(0o755)
    for path in stage.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def _manifest(layout: Layout, facts: Facts, notes: Notes, options: Options, origin: Origin) -> Manifest:
    prompts, default_prompt = layouts.prompts(layout.folder, layout.name)
    return Manifest(
        name=layout.name,
        architecture=layout.architecture,
        precision=options.precision,
        dimensions=facts.dimensions,
        max_tokens=facts.max_tokens,
        position_limit=facts.position_limit,
        normalizes=layout.normalizes,
        prompts=prompts,
        default_prompt=default_prompt,
        origin=origin,
        converted=notes.converted,
        assumed=[*notes.assumed, *filter(None, [layouts.document_prompt_note(layout.folder, layout.name)])],
        tools={tool: _version(tool) for tool in TOOLS},
        added=datetime.now(UTC).isoformat(timespec="seconds"),
        files=manifests.hash_files(layout.folder, manifests.paths(layout.folder)),
        encoder=facts.encoder,
        encoder_note=facts.encoder_note,
    )


def _version(tool: str) -> str:
    try:
        return importlib.metadata.version(tool)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _origin(layout: Layout, options: Options, origin: tuple[str, str | None]) -> Origin:
    hashes = {file: manifests.sha256(layout.folder / file) for file in layouts.needed_files(layout)}
    return Origin(source=origin[0], revision=origin[1], options=asdict(options), files=hashes)


def _same(folder: Path, origin: Origin) -> Manifest | None:
    """Returns the model that is there, if it was made from the same files in the same way and is intact."""
    try:
        present = manifests.read(folder)
    except (FileNotFoundError, BadManifest):
        return None
    same = (present.origin.files, present.origin.options) == (origin.files, origin.options)
    return present if same and model_directory.status(folder, present) == "ready" else None


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Lets one change in at a time; whoever holds the lock clears what killed predecessors left."""
    try:
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        with (directory / LOCK).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for leftover in directory.glob(".*.*"):
                shutil.rmtree(leftover, ignore_errors=True)
            yield
    except OSError as error:
        raise _unwritable(directory, error) from None
    except Exception as error:
        if found := RUSTS.search(str(error)):  # what safetensors and tokenizers make of the system's error
            raise _unwritable(directory, OSError(int(found[1]), os.strerror(int(found[1])))) from None
        raise


def _unwritable(directory: Path, error: OSError) -> UnwritableDirectory:
    hint = "Make room there, or name another directory with --dir." if error.errno in FULL else None
    return UnwritableDirectory(path=directory, reason=error.strerror or error, hint=hint)


def _put_in_place(stage: Path, folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as grave:
        old = Path(grave) / folder.name
        if folder.exists():
            folder.rename(old)
        try:
            stage.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise


def _discard(folder: Path) -> None:
    """Takes it out of sight in one step; sessions that have its files mapped keep them."""
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as grave:
        folder.rename(Path(grave) / folder.name)
