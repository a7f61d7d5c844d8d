"""The model directory: finds, lists and verifies registered models.

Finding reads a manifest, never weights: it needs no numpy, torch or sentence_transformers.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

from autoembed.errors import (
    AutoembedError,
    BrokenModel,
    ChangedModel,
    InvalidName,
    NoDefaultModel,
    UnknownModel,
    UnreadableModel,
    WrongDimensions,
)
from autoembed.models import manifest as manifests
from autoembed.models.manifest import BadManifest, File, Manifest, Stamp
from autoembed.models.model import PACKED_ENCODER, Entry, Model
from autoembed.settings import DEFAULT_MODEL, Settings

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
SMALL = 1 << 20
HASHED: dict[tuple[Path, str], Stamp] = {}
"""What this process has hashed, or the postmaster before it: a copied model's manifest has another file's stamps."""


def check_name(name: str) -> str:
    if NAME.fullmatch(name):
        return name
    last = name.rstrip("/").rsplit("/", 1)[-1]
    if last != name and NAME.fullmatch(last):
        raise InvalidName(name=name, hint=f'SQL names a model, never a path. Did you mean "{last}"?')
    raise InvalidName(name=name)


def find(settings: Settings, name: str | None = None) -> Model:
    """Returns the model of this name, or the default one."""
    if name is None and not _is_folder(settings.model_dir / default_name(settings)):
        raise NoDefaultModel(name=default_name(settings), directory=settings.model_dir, hint=_way_out(settings))
    name = check_name(name) if name is not None else default_name(settings)
    folder = settings.model_dir / name
    manifest = _manifest(folder, name, settings.model_dir)
    _check_presence(folder, manifest, name)
    model = _model(folder, manifest, settings)
    if settings.dimensions not in (None, model.dimensions):
        raise WrongDimensions(name=name, expected=settings.dimensions, actual=model.dimensions)
    return model


def default_name(settings: Settings) -> str:
    """Returns EMBEDDING_MODEL_NAME; unset, the only model that is there."""
    if settings.model_name is not None:
        return check_name(settings.model_name)
    names = registered(settings.model_dir)
    return names[0] if len(names) == 1 else DEFAULT_MODEL


def registered(directory: Path) -> list[str]:
    return [folder.name for folder in _folders(directory) if _is_registered(folder)]


def catalog(settings: Settings) -> list[Entry]:
    return [_entry(folder, settings) for folder in _folders(settings.model_dir)]


def status(folder: Path, manifest: Manifest) -> str:
    """Returns 'ready', or 'broken: why', as far as a look at the files tells; hashes are for `verify`."""
    try:
        _check_presence(folder, manifest, folder.name)
        _check_strangers(folder, manifest, folder.name)
        for name, file in manifest.files.items():
            if (folder / name).stat().st_size != file.stamp.size:
                return f"broken: {name} has another size"
    except AutoembedError as error:
        return f"broken: {error}"
    except OSError as error:
        return f"broken: {_unreadable(folder, error)}"
    return "ready"


def verify(model: Model) -> None:
    """Hashes every file against the manifest; then renews the stamps where the manifest can be written."""
    manifest = _manifest(model.path, model.name, model.path.parent)
    _check_strangers(model.path, manifest, model.name)
    found = _describe(model.path, manifest, model.name)
    for name, file in found.items():
        if file.sha256 != manifest.files[name].sha256:
            raise ChangedModel(name=model.name, file=name, change="has another SHA-256")
    if found != manifest.files:
        _renew(model.path, dataclasses.replace(manifest, files=found))


def check_files(model: Model) -> None:
    """Does as `verify` does, but takes a file whose stamp is still the recorded one as unchanged."""
    manifest = _manifest(model.path, model.name, model.path.parent)
    _check_strangers(model.path, manifest, model.name)
    for name, file in manifest.files.items():
        if not _unchanged(model.path / name, file):
            raise ChangedModel(name=model.name, file=name, change="is missing or has another SHA-256")


def look(model: Model) -> list[str]:
    """Does as `check_files` does, but in milliseconds: it names large files whose stamps differ, and hashes none."""
    manifest = _manifest(model.path, model.name, model.path.parent)
    _check_strangers(model.path, manifest, model.name)
    unsure = []
    for name, file in manifest.files.items():
        size = _size(model.path, name)
        if size != file.stamp.size:
            raise ChangedModel(name=model.name, file=name, change="has another size")
        if size > SMALL and not _is_known(model.path / name, file):
            unsure.append(name)
        elif not _unchanged(model.path / name, file):
            raise ChangedModel(name=model.name, file=name, change="has another SHA-256")
    return unsure


def _size(folder: Path, file: str) -> int:
    try:
        return (folder / file).stat().st_size
    except OSError as error:
        raise _unreadable(folder, error) from None


def _folders(directory: Path) -> Iterator[Path]:
    """Returns the folders that can be models, by name; the hidden ones are additions under way."""
    try:
        found = sorted(folder for folder in directory.iterdir() if not folder.name.startswith("."))
    except FileNotFoundError:
        return
    except OSError as error:
        raise UnreadableModel(path=directory, reason=error.strerror) from None
    yield from filter(_is_folder, found)


def _is_folder(path: Path) -> bool:
    """Says yes also to a link to where nobody may look: what it is shows when it is opened."""
    try:
        return path.is_dir()
    except OSError:
        return True


def _is_registered(folder: Path) -> bool:
    """Says no where nobody may look: at a copy under way, or at another user's."""
    try:
        return (folder / manifests.FILE).is_file()
    except OSError:
        return False


def _unreadable(folder: Path, error: OSError) -> UnreadableModel:
    return UnreadableModel(path=error.filename or folder, reason=error.strerror or error)


def _manifest(folder: Path, name: str, directory: Path) -> Manifest:
    try:
        return manifests.read(folder)
    except FileNotFoundError:
        if _is_folder(folder):
            raise BrokenModel(name=name, reason="it was not added", hint=_add_hint(folder)) from None
        raise UnknownModel(name=name, directory=directory, hint=_choice(directory)) from None
    except BadManifest as problem:
        raise BrokenModel(name=name, reason=problem) from None
    except OSError as error:
        raise _unreadable(folder, error) from None


def _add_hint(folder: Path) -> str:
    return f"A folder becomes a model by `autoembed model add {folder} --name ANOTHER_NAME`."


def _way_out(settings: Settings) -> str:
    names = registered(settings.model_dir)
    if not names:
        return _choice(settings.model_dir)
    ways = f"Name one (model => '{names[0]}'), or set EMBEDDING_MODEL_NAME in the server's environment."
    return f"{ways} {_choice(settings.model_dir)}"


def _choice(directory: Path) -> str:
    add = "`autoembed model add PATH` or `autoembed model pull NAME`"
    names = registered(directory)
    return f"There are: {', '.join(names)}. Others come by {add}." if names else f"There is none yet. Add one by {add}."


def _model(folder: Path, manifest: Manifest, settings: Settings) -> Model:
    wanted = settings.max_seq_length or manifest.max_tokens
    max_tokens = min(wanted, manifest.position_limit)
    return Model(
        name=folder.name,
        path=folder,
        dimensions=manifest.dimensions,
        max_tokens=max_tokens,
        fingerprint=manifest.fingerprint(max_tokens),
        architecture=manifest.architecture,
        precision=manifest.precision,
        normalizes=manifest.normalizes,
        prompts=manifest.prompts,
        default_prompt=manifest.default_prompt,
        bytes=manifest.weights,
        encoder=manifest.encoder,
    )


def _entry(folder: Path, settings: Settings) -> Entry:
    if not NAME.fullmatch(folder.name):
        return Entry(folder.name, "broken: not a model's name")
    try:
        if not (folder / manifests.FILE).is_file():
            return Entry(folder.name, "unregistered", note="`autoembed model add` registers it")
        manifest = _manifest(folder, folder.name, settings.model_dir)
    except AutoembedError as error:
        return Entry(folder.name, f"broken: {error}")
    except OSError as error:
        return Entry(folder.name, f"broken: {_unreadable(folder, error)}")
    model = _model(folder, manifest, settings)
    return Entry(
        name=model.name,
        status=status(folder, manifest),
        dimensions=model.dimensions,
        max_tokens=model.max_tokens,
        architecture=model.architecture,
        precision=model.precision,
        fingerprint=model.fingerprint,
        bytes=model.bytes,
        note="; ".join([_served(manifest), *manifest.converted, *manifest.assumed]),
    )


def _served(manifest: Manifest) -> str:
    if manifest.encoder == PACKED_ENCODER:
        return "served by the packed encoder"
    why = f", since {manifest.encoder_note}" if manifest.encoder_note else ""
    return f"served by sentence-transformers, about half as fast{why}"


def _check_presence(folder: Path, manifest: Manifest, name: str) -> None:
    try:
        missing = [file for file in manifest.files if not (folder / file).is_file()]
    except OSError as error:
        raise _unreadable(folder, error) from None
    if missing:
        raise BrokenModel(name=name, reason=f"{missing[0]} is missing")


def _check_strangers(folder: Path, manifest: Manifest, name: str) -> None:
    """Refuses a file too many: adapters and other weights are picked up by their mere presence."""
    for file in manifests.paths(folder):
        if file not in manifest.files:
            raise ChangedModel(name=name, file=file, change="was not there")


def _describe(folder: Path, manifest: Manifest, name: str) -> dict[str, File]:
    _check_presence(folder, manifest, name)
    try:
        return manifests.hash_files(folder, manifest.files)
    except OSError as error:
        raise _unreadable(folder, error) from None


def _unchanged(path: Path, file: File) -> bool:
    try:
        stamp = Stamp.of(path)
        if not _is_known(path, file) and manifests.sha256(path) != file.sha256:
            return False
    except OSError:
        return False
    HASHED[path, file.sha256] = stamp
    return True


def _is_known(path: Path, file: File) -> bool:
    return Stamp.of(path) in (file.stamp, HASHED.get((path, file.sha256)))


def _renew(folder: Path, manifest: Manifest) -> None:
    try:
        manifests.write(folder, manifest)
    except OSError:
        return  # a reader without the right to write: the next load hashes again
