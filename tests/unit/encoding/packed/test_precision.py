"""Lower precisions: float32 is what they are measured against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import models_for_tests as made
from autoembed.adding.add import add_model
from autoembed.adding.convert import Options
from autoembed.encoding.batching import Failure, Vector, encode_all
from autoembed.encoding.load import load_encoder
from autoembed.encoding.packed import encoder as packed
from autoembed.encoding.packed import kernels
from autoembed.encoding.protocol import Encoder
from autoembed.errors import BrokenModel, InvalidOption
from autoembed.models import directory
from autoembed.models import layout as layouts
from autoembed.process import cpu
from autoembed.settings import Settings
from unit.encoding.test_reference import TEXTS

EVERY = frozenset().union(*cpu.NEEDED.values())
TEXT = "Write-ahead logging makes a crash survivable: what was committed is written again from the log. "
Add = Callable[..., Encoder]


@pytest.fixture
def add(tmp_path: Path, shelf: Settings, monkeypatch: pytest.MonkeyPatch) -> Add:
    """add(folder, precision): an encoder of it, on a processor that has everything."""
    monkeypatch.setattr(cpu, "flags", lambda: EVERY)
    current = replace(shelf, model_dir=tmp_path / "precise")

    def make(folder: Path, precision: str) -> Encoder:
        name = f"{folder.name}-{precision}"
        add_model(folder, current.model_dir, name=name, options=Options(precision=precision))
        return load_encoder(directory.find(current, name), current)

    return make


def vectors(encoder: Encoder, texts: tuple[str, ...]) -> NDArray[np.float32]:
    outcomes = encode_all(encoder, texts, prompt="", checkpoint=lambda: None)
    return np.stack([outcome.values for outcome in outcomes if isinstance(outcome, Vector)])


def many() -> tuple[str, ...]:
    """Of all lengths, and in a jumble."""
    words = (TEXT * 8).split()
    return tuple(" ".join(words[start : start + start % 61 + 1]) for start in range(0, 60, 3)) + TEXTS


def test_int8_is_close_to_float32_on_real_weights(add: Add, load: Add, folders: dict[str, Path]) -> None:
    """With the largest inputs as bytes like all others the least cosine was below 0.9985."""
    cosines = (
        vectors(add(folders["all-MiniLM-L6-v2"], "int8"), many()) * vectors(load("all-MiniLM-L6-v2"), many())
    ).sum(1)
    assert cosines.min() > 0.999


@pytest.mark.parametrize("precision", ["int8", "bfloat16"])
@pytest.mark.parametrize("name", ["tiny-codebert", "tiny-bge-m3", "tiny-mpnet", "minilm-768"])
def test_each_architecture(add: Add, load: Add, folders: dict[str, Path], name: str, precision: str) -> None:
    mine, full = (vectors(encoder, TEXTS) for encoder in (add(folders[name], precision), load(name)))
    cosines = (mine * full).sum(1) / np.linalg.norm(mine, axis=1) / np.linalg.norm(full, axis=1)
    assert cosines.min() > 0.998


def test_int8_vectors_do_not_depend_on_their_neighbours(add: Add, folders: dict[str, Path]) -> None:
    """Rows are quantized one by one, and sums of bytes are exact: not even the last bit may differ by neighbours."""
    encoder = add(folders["all-MiniLM-L6-v2"], "int8")
    together = vectors(encoder, many())
    assert np.array_equal(together, vectors(encoder, many()))
    for text, neighbour in list(zip(many(), together, strict=True))[::5]:
        np.testing.assert_allclose(vectors(encoder, (text,))[0], neighbour, atol=1e-6)


def test_nan_is_not_lost_among_bytes(add: Add, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = add(made.nan_for("banana", tmp_path), "int8")
    outcomes = encode_all(encoder, ["an apple", "a banana"], prompt="", checkpoint=lambda: None)
    assert [outcome.kind if isinstance(outcome, Failure) else "" for outcome in outcomes] == ["", "vector"]


def test_the_weights_of_a_precision_replace_the_published(add: Add, load: Add, folders: dict[str, Path]) -> None:
    encoder = add(folders["all-MiniLM-L6-v2"], "int8")
    weights = [file.name for file in encoder.model.path.rglob("*.safetensors")]
    assert weights == ["int8.safetensors"]
    assert encoder.model.precision == "int8"
    assert encoder.model.fingerprint != load("all-MiniLM-L6-v2").model.fingerprint
    directory.verify(encoder.model)


@pytest.mark.parametrize("precision", ["int8", "bfloat16"])
def test_a_precision_that_the_processor_emulates_is_refused(
    add: Add, folders: dict[str, Path], shelf: Settings, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    model = add(folders["tiny-mpnet"], precision).model
    monkeypatch.setattr(cpu, "flags", lambda: frozenset({"avx2"}))
    with pytest.raises(BrokenModel, match=f"{precision} would be slower than float32"):
        load_encoder(model, shelf)
    with pytest.raises(InvalidOption, match="--precision must be float32 here"):
        add_model(folders["tiny-mpnet"], model.path.parent, name="other", options=Options(precision=precision))
    assert not (model.path.parent / "other").exists()


def test_what_the_packed_encoder_does_not_serve_has_float32_only(add: Add, folders: dict[str, Path]) -> None:
    with pytest.raises(BrokenModel, match="int8 only in the packed encoder"):
        add(folders["served-by-sentence-transformers"], "int8")


@pytest.mark.parametrize("precision", ["int8", "bfloat16"])
def test_other_activations(add: Add, folders: dict[str, Path], tmp_path: Path, load: Add, precision: str) -> None:
    import shutil

    folder = Path(shutil.copytree(folders["tiny-mpnet"], tmp_path / "relu"))
    config = layouts.read_json(folder / "config.json", "relu")
    made.write_json(folder / "config.json", {**config, "hidden_act": "relu"})
    mine, full = (vectors(add(folder, each), TEXTS) for each in (precision, "float32"))
    cosines = (mine * full).sum(1) / np.linalg.norm(mine, axis=1) / np.linalg.norm(full, axis=1)
    assert cosines.min() > 0.998


def test_without_a_compiler_int8_is_refused_and_bfloat16_is_torchs(
    add: Add, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "library", lambda: None)
    with pytest.raises(BrokenModel, match="int8 is not computed here: this installation was built without a C"):
        add(folders["tiny-mpnet"], "int8")
    full = vectors(add(folders["tiny-mpnet"], "float32"), TEXTS)
    mine = vectors(add(folders["tiny-mpnet"], "bfloat16"), TEXTS)
    cosines = (mine * full).sum(1) / np.linalg.norm(mine, axis=1) / np.linalg.norm(full, axis=1)
    assert cosines.min() > 0.998


def test_flags_are_read_as_linux_writes_them(tmp_path: Path) -> None:
    for name in ("flags", "Features"):
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{name}\t\t: fpu avx2 bf16\n\nprocessor\t: 1\n{name}: fpu\n")
        assert cpu.flags(tmp_path / "cpuinfo") == {"fpu", "avx2", "bf16"}
    assert cpu.flags(tmp_path / "nothing") == frozenset()
    assert cpu.lacks("float32") is None


def test_prepared_weights_are_mapped() -> None:
    assert packed.CONVERTED_FILES == {"bfloat16": "bfloat16.safetensors", "int8": "int8.safetensors"}
