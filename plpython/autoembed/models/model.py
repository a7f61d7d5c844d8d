"""A registered model, as every other room speaks of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

MEGABYTE = 1 << 20
PACKED_ENCODER = "packed"
"""The value of `Model.encoder` for a model that the product's own encoder serves."""


@dataclass(frozen=True)
class Model:
    """A registered model as the settings make it; `default_prompt` names one of `prompts`."""

    name: str
    path: Path
    dimensions: int
    max_tokens: int
    fingerprint: str
    architecture: str
    precision: str
    normalizes: bool
    prompts: Mapping[str, str]
    default_prompt: str | None
    bytes: int
    encoder: str = "sentence-transformers"


@dataclass(frozen=True)
class Entry:
    """One folder of the model directory; status is 'ready', 'unregistered' or 'broken: why'."""

    name: str
    status: str
    dimensions: int | None = None
    max_tokens: int | None = None
    architecture: str | None = None
    precision: str | None = None
    fingerprint: str | None = None
    bytes: int | None = None
    note: str | None = None
