"""Fixtures of the tests that need no server: model folders, and a model directory that holds them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import hypothesis
import pytest

import models_for_tests as made
from autoembed import settings
from autoembed.adding.add import add_model
from autoembed.encoding.load import load_encoder
from autoembed.encoding.protocol import Encoder
from autoembed.models import directory as model_directory
from autoembed.settings import Settings

# The checkout may be read-only for whoever runs the tests, and two cores may be busy.
hypothesis.settings.register_profile("plain", database=None, deadline=None, max_examples=50)
hypothesis.settings.load_profile("plain")

MAKERS: tuple[Callable[[Path], Path], ...] = (
    made.minilm,
    made.dense768,
    made.tiny_roberta,
    made.tiny_xlmr,
    made.tiny_mpnet,
    made.two_poolings,
)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models as they are published, by name. Do not change them."""
    directory = tmp_path_factory.mktemp("published")
    return {folder.name: folder for folder in (make(directory) for make in MAKERS)}


@pytest.fixture(scope="session")
def shelf(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings of a model directory with all of them. Do not change it."""
    directory = tmp_path_factory.mktemp("shelf")
    for folder in folders.values():
        add_model(folder, directory)
    return settings.read({"EMBEDDING_MODEL_DIR": str(directory), "EMBEDDING_DEVICE": "cpu"})


@pytest.fixture
def own_shelf(folders: dict[str, Path], tmp_path: Path) -> Settings:
    """A model directory of the test's own, with tiny-mpnet in it."""
    directory = tmp_path / "own-shelf"
    add_model(folders["tiny-mpnet"], directory)
    return settings.read({"EMBEDDING_MODEL_DIR": str(directory), "EMBEDDING_DEVICE": "cpu"})


@pytest.fixture(scope="session")
def load(shelf: Settings) -> Callable[..., Encoder]:
    """load(name, max_seq_length=...): an encoder from the shelf."""

    def open_encoder(name: str, **changes: int) -> Encoder:
        current = replace(shelf, **changes)  # type: ignore[arg-type]
        return load_encoder(model_directory.find(current, name), current)

    return open_encoder
