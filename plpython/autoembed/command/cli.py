"""The command line, run by the administrator outside the server: python -m autoembed ..."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from autoembed import __version__, settings
from autoembed.adding.add import add_model, remove_model
from autoembed.errors import AutoembedError
from autoembed.models import directory as model_directory
from autoembed.models.model import MEGABYTE, Entry
from autoembed.settings import Settings

if TYPE_CHECKING:
    from autoembed.adding.add import Added
    from autoembed.adding.convert import Options


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = _parser().parse_args(arguments)
    try:
        return int(parsed.run(parsed))
    except AutoembedError as error:
        _complain(error)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was left behind", file=sys.stderr)
        return 130


def _add(parsed: argparse.Namespace) -> int:

    directory = _settings(parsed).model_dir
    added = add_model(parsed.path, directory, name=parsed.name, options=_options(parsed), force=parsed.force)
    return _tell(added)


def _pull(parsed: argparse.Namespace) -> int:
    from autoembed.adding import hub

    directory = _settings(parsed).model_dir
    name = parsed.name or parsed.repository.rsplit("/", 1)[-1]
    model_directory.check_name(name)
    with hub.download(parsed.repository, parsed.revision) as snapshot:
        origin = (snapshot.repository, snapshot.commit)
        options, force = _options(parsed), parsed.force
        added = add_model(snapshot.folder, directory, name=name, options=options, force=force, origin=origin)
    return _tell(added)


def _list(parsed: argparse.Namespace) -> int:
    directory = _settings(parsed).model_dir
    entries = model_directory.catalog(_settings(parsed))
    if not entries:
        print(f"no model in {directory}")
    for entry in entries:
        print(_line(entry))
    return 0


def _verify(parsed: argparse.Namespace) -> int:
    current = _settings(parsed)
    names = [parsed.name] if parsed.name else [entry.name for entry in model_directory.catalog(current)]
    return max([_verify_one(name, current) for name in names], default=0)


def _verify_one(name: str, current: Settings) -> int:
    try:
        model_directory.verify(model_directory.find(current, name))
    except AutoembedError as error:
        _complain(error)
        return 1
    print(f"{name}: every file is as it was added")
    return 0


def _remove(parsed: argparse.Namespace) -> int:

    remove_model(parsed.name, _settings(parsed).model_dir)
    print(f"{parsed.name}: removed")
    return 0


def _doctor(_: argparse.Namespace) -> int:
    from autoembed.command import doctor

    checks = doctor.examine()
    print(doctor.render(checks))
    return int(doctor.is_ill(checks))


def _settings(parsed: argparse.Namespace) -> Settings:
    """Reads the settings. EMBEDDING_DIMENSIONS is a demand on the model that the server uses, not on others."""
    current = dataclasses.replace(settings.read(), dimensions=None)
    return dataclasses.replace(current, model_dir=parsed.dir.absolute()) if parsed.dir else current


def _options(parsed: argparse.Namespace) -> Options:
    from autoembed.adding.convert import Options

    return Options(
        pooling=parsed.pooling, normalize=parsed.normalize, precision=parsed.precision or settings.read().precision
    )


def _tell(added: Added) -> int:
    manifest = added.manifest
    print(f"{added.folder.name}: {'added' if added.new else 'already there, unchanged'} in {added.folder.parent}")
    normalised = "normalised" if manifest.normalizes else "not normalised"
    print(f"  {manifest.architecture}, {manifest.dimensions} dimensions, {manifest.max_tokens} tokens, {normalised}")
    for note in manifest.converted:
        print(f"  converted: {note}")
    for note in manifest.assumed:
        print(f"  assumed: {note}")
    if len(names := model_directory.registered(added.folder.parent)) > 1:
        print(f"  {len(names)} models are there: name one in embed_column and embed, or in EMBEDDING_MODEL_NAME")
    return 0


def _line(entry: Entry) -> str:
    if entry.fingerprint is None:
        return f"{entry.name}: {entry.status}"
    facts = f"{entry.architecture}, {entry.dimensions} dimensions, {entry.max_tokens} tokens"
    size = f"{(entry.bytes or 0) / MEGABYTE:.0f} MB"
    return f"{entry.name}: {entry.status}, {facts}, {size}, fingerprint {entry.fingerprint[:12]}"


def _complain(error: AutoembedError) -> None:
    print(f"error: {error}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="autoembed", description="Models and health of pg_autoembed.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _model_commands(commands.add_parser("model", help="the model directory").add_subparsers(required=True))
    doctor = commands.add_parser("doctor", help="what is installed, found and wrong, in one screen")
    doctor.set_defaults(run=_doctor)
    return parser


def _model_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    add = commands.add_parser("add", help="copy, convert and register a model's folder")
    add.add_argument("path", type=Path, metavar="PATH")
    pull = commands.add_parser("pull", help="download a model from the hub, then add it")
    pull.add_argument("repository", metavar="NAME", help="OWNER/NAME; without OWNER sentence-transformers'")
    pull.add_argument("--revision", help="a branch, tag or commit; its commit is recorded")
    listing = commands.add_parser("list", help="the models that are there")
    verify = commands.add_parser("verify", help="hash every file against the manifest")
    verify.add_argument("name", nargs="?", metavar="NAME", help="all models without it")
    remove = commands.add_parser("remove", help="delete a model")
    remove.add_argument("name", metavar="NAME")
    for command, run in ((add, _add), (pull, _pull), (listing, _list), (verify, _verify), (remove, _remove)):
        command.add_argument("--dir", type=Path, help="the model directory (EMBEDDING_MODEL_DIR)")
        command.set_defaults(run=run)
    for command in (add, pull):
        _adding_options(command)


def _adding_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--name", help="the model's name in SQL (the folder's name)")
    command.add_argument("--pooling", choices=("mean", "cls", "max"), help="for a bare transformers folder (mean)")
    command.add_argument(
        "--normalize", action=argparse.BooleanOptionalAction, help="for a bare transformers folder (no)"
    )
    command.add_argument(
        "--precision", choices=settings.PRECISIONS, help="of the weights; unset: EMBEDDING_PRECISION, else float32"
    )
    command.add_argument("--force", action="store_true", help="replace another model of that name")
