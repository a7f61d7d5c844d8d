"""The settings: EMBEDDING_* variables of the server's environment, which only its administrator can set."""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoembed.errors import InvalidSetting

DEFAULT_MODEL = "all-mpnet-base-v2"
DEFAULT_DIRECTORY = "/var/lib/pg_autoembed/models"
DEVICES = ("auto", "cpu", "cuda", "cuda:N", "mps")
NUMBERED = re.compile(r"cuda:(0|[1-9][0-9]{0,2})")
NO_SETTING = "not a setting"
PRECISIONS = ("float32", "bfloat16", "int8")
PREFIX = "EMBEDDING_"


@dataclass(frozen=True)
class Settings:
    model_name: str | None
    model_dir: Path
    batch_size: int
    device: str
    max_seq_length: int | None
    dimensions: int | None
    threads: int | None
    precision: str
    max_memory_mb: int | None
    max_models: int
    preload: tuple[str, ...]
    immediate_rows: int


@dataclass(frozen=True)
class Variable:
    """One setting: its field in Settings, its default as one would write it, and how to read it."""

    field: str
    default: str | None
    parse: Callable[[str], Any]

    @property
    def name(self) -> str:
        return PREFIX + self.field.upper()

    def raw(self, environ: Mapping[str, str]) -> str | None:
        return environ.get(self.spelling(environ), "").strip() or None

    def spelling(self, environ: Mapping[str, str]) -> str:
        """Returns the name that is read: its own, else the first that differs in case alone."""
        if self.name in environ:
            return self.name
        return min((name for name in environ if name.upper() == self.name), default=self.name)

    def read(self, environ: Mapping[str, str]) -> Any:
        raw = self.raw(environ)
        text = self.default if raw is None else raw
        if text is None:
            return None
        try:
            return self.parse(text)
        except ValueError as problem:
            raise InvalidSetting(variable=self.name, problem=f"{problem}, not {text!r}") from None


def _whole(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and least <= int(text) <= most):
            raise ValueError(f"must be a whole number from {least} to {most}")
        return int(text)

    return parse


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text.lower() not in choices:
            raise ValueError(f"must be {' or '.join(choices)}")
        return text.lower()

    return parse


def _device(text: str) -> str:
    return text.lower() if NUMBERED.fullmatch(text.lower()) else _one_of(*DEVICES)(text)


def _directory(text: str) -> Path:
    path = Path(text)
    if not path.is_absolute():
        raise ValueError("must be an absolute path")
    return path


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


VARIABLES = (
    Variable("model_name", None, str),
    Variable("model_dir", DEFAULT_DIRECTORY, _directory),
    Variable("batch_size", "32", _whole(1, 512)),
    Variable("device", "auto", _device),
    Variable("max_seq_length", None, _whole(4, 1_000_000)),
    Variable("dimensions", None, _whole(1, 16_000)),
    Variable("threads", None, _whole(1, 1024)),
    Variable("precision", "float32", _one_of(*PRECISIONS)),
    Variable("max_memory_mb", None, _whole(1, 100_000_000)),
    Variable("max_models", "3", _whole(1, 16)),
    Variable("preload", "", _names),
    Variable("immediate_rows", "128", _whole(0, 1_000_000)),
)


def read(environ: Mapping[str, str] = os.environ) -> Settings:
    return Settings(**{variable.field: variable.read(environ) for variable in VARIABLES})


def report(environ: Mapping[str, str] = os.environ) -> list[tuple[str, str | None, str]]:
    """Returns each setting's name, value and source. Never raises: it is what one looks at when a setting is wrong."""
    rows = [_row(variable, environ) for variable in VARIABLES]
    return rows + [(name, environ[name], NO_SETTING) for name in unknown(environ)]


def preload_names(environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Returns what EMBEDDING_PRELOAD names, also where another setting is wrong."""
    preload = next(variable for variable in VARIABLES if variable.field == "preload")
    return _names(preload.raw(environ) or "")


def unknown(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Returns variables that look like settings and are none: most often a typing mistake."""
    known = {variable.spelling(environ) for variable in VARIABLES}
    return sorted(name for name in environ if name.upper().startswith(PREFIX) and name not in known)


def _row(variable: Variable, environ: Mapping[str, str]) -> tuple[str, str | None, str]:
    raw = variable.raw(environ)
    if raw is None:
        default = variable.default
        if variable.field == "model_name":
            default = f"{DEFAULT_MODEL}, or the only model there is"
        return variable.name, default or None, "default"
    try:
        variable.read(environ)
    except InvalidSetting as error:
        return variable.name, raw, f"invalid: {error}"
    return variable.name, raw, "environment"
