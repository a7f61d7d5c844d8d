"""sentence-transformers, opened by itself and in float32, is the oracle."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import models_for_tests as made
from autoembed.adding.add import add_model
from autoembed.encoding import reference as reference_encoder
from autoembed.encoding.batching import Failure, Vector, encode_all
from autoembed.encoding.load import load_encoder
from autoembed.encoding.protocol import Encoder
from autoembed.errors import BrokenModel, DeviceUnavailable, MissingPackage, OutOfMemory
from autoembed.models import directory
from autoembed.process import device
from autoembed.settings import Settings

NAMES = ("all-MiniLM-L6-v2", "minilm-768", "tiny-codebert", "tiny-bge-m3", "tiny-mpnet")
TEXTS = (
    "A column is declared once.",
    "x",
    "vacuum removes dead rows, " * 40,
    "Grüße, 漢字 🦊",
    "select count(*) from knowledge_base",
)


def outcomes(encoder: Encoder, texts: tuple[str, ...] = TEXTS, prompt: str = "") -> list[Vector]:
    done = encode_all(encoder, texts, prompt=prompt, checkpoint=lambda: None)
    return [outcome for outcome in done if isinstance(outcome, Vector)]


def oracle(folder: Path, texts: tuple[str, ...] = TEXTS, **arguments: Any) -> NDArray[np.float32]:
    from sentence_transformers import SentenceTransformer

    reference = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    return np.asarray(reference.encode(list(texts), batch_size=32, **arguments))


@pytest.mark.parametrize("name", NAMES)
def test_vectors_are_sentence_transformers_own(load: Callable[..., Encoder], shelf: Settings, name: str) -> None:
    encoder = load(name)
    found = outcomes(encoder)
    assert len(found) == len(TEXTS)
    vectors = np.stack([each.values for each in found])
    assert vectors.dtype == np.float32
    assert vectors.shape[1] == encoder.model.dimensions
    np.testing.assert_allclose(vectors, oracle(shelf.model_dir / name), atol=2e-6)


@pytest.mark.parametrize("name", ["all-MiniLM-L6-v2", "minilm-768"])
def test_a_published_model_gives_the_same_vectors_before_and_after_adding(
    load: Callable[..., Encoder], folders: dict[str, Path], name: str
) -> None:
    vectors = np.stack([each.values for each in outcomes(load(name))])
    np.testing.assert_allclose(vectors, oracle(folders[name]), atol=2e-6)


def test_more_dimensions_keep_the_cosines(load: Callable[..., Encoder]) -> None:
    small, large = (np.stack([each.values for each in outcomes(load(name))]) for name in NAMES[:2])
    np.testing.assert_allclose(small @ small.T, large @ large.T, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_counted_before_truncation(load: Callable[..., Encoder], shelf: Settings, name: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shelf.model_dir / name, local_files_only=True)
    expected = [len(tokenizer(text)["input_ids"]) for text in TEXTS]
    encoder = load(name)
    found = outcomes(encoder)
    assert [each.tokens for each in encoder.tokenize(TEXTS)] == expected
    assert [each.tokens for each in found] == expected
    assert [each.truncated for each in found] == [count > encoder.model.max_tokens for count in expected]
    assert max(expected) > 64


def test_a_truncated_text_is_its_beginning(load: Callable[..., Encoder]) -> None:
    long, cut = outcomes(
        load("all-MiniLM-L6-v2", max_seq_length=8),
        ("one two three four five six seven eight nine", "one two three four five six"),
    )
    assert (long.truncated, long.tokens, cut.truncated, cut.tokens) == (True, 11, False, 8)
    np.testing.assert_allclose(long.values, cut.values, atol=1e-6)


def test_the_length_may_reach_the_positions_and_no_further(load: Callable[..., Encoder]) -> None:
    (longest,) = outcomes(load("tiny-codebert", max_seq_length=9999), ("vacuum " * 200,))
    assert longest.truncated


def test_prompts_are_prepended(load: Callable[..., Encoder], shelf: Settings) -> None:
    encoder = load("tiny-mpnet")
    assert encoder.model.prompts == {"query": "query: ", "document": "passage: "}
    for kind in ("query", "document"):
        prompt = encoder.model.prompts[kind]
        vectors = np.stack([each.values for each in outcomes(encoder, prompt=prompt)])
        np.testing.assert_allclose(vectors, oracle(encoder.model.path, prompt_name=kind), atol=2e-6)
    assert outcomes(encoder, prompt="query: ")[1].tokens > outcomes(encoder)[1].tokens


def test_a_default_prompt_is_not_added_behind_the_callers_back(
    folders: dict[str, Path], tmp_path: Path, shelf: Settings
) -> None:
    import shutil

    folder = Path(shutil.copytree(folders["tiny-mpnet"], tmp_path / "prompted"))
    made.write_json(
        folder / "config_sentence_transformers.json", {"prompts": {"passage": "p: "}, "default_prompt_name": "passage"}
    )
    current = replace(shelf, model_dir=tmp_path / "shelf")
    add_model(folder, current.model_dir)
    model = directory.find(current, "prompted")
    assert (model.prompts, model.default_prompt) == ({"query": "", "document": "p: ", "passage": "p: "}, "passage")
    encoder = load_encoder(model, current)
    vectors = np.stack([each.values for each in outcomes(encoder)])
    np.testing.assert_allclose(vectors, oracle(model.path, prompt=""), atol=2e-6)


@pytest.mark.parametrize("name", ["all-MiniLM-L6-v2", "tiny-mpnet"])
def test_a_vector_does_not_depend_on_its_neighbours(load: Callable[..., Encoder], name: str) -> None:
    encoder = load(name)
    together = outcomes(encoder)
    for text, neighbour in zip(TEXTS, together, strict=True):
        (alone,) = outcomes(encoder, (text,))
        np.testing.assert_allclose(alone.values, neighbour.values, atol=1e-6)


def test_half_precision_weights_are_computed_in_float32(
    folders: dict[str, Path], tmp_path: Path, shelf: Settings
) -> None:
    import shutil

    folder = Path(shutil.copytree(folders["tiny-mpnet"], tmp_path / "half"))
    made.change_weights(folder, lambda weights: weights.update({key: value.half() for key, value in weights.items()}))
    current = replace(shelf, model_dir=tmp_path / "shelf")
    add_model(folder, current.model_dir)
    (vector,) = outcomes(load_encoder(directory.find(current, "half"), current), ("x",))
    assert abs(float(np.linalg.norm(vector.values.astype(np.float64))) - 1) < 1e-6


def test_nothing_reaches_for_the_network(
    folders: dict[str, Path], tmp_path: Path, shelf: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    current = replace(shelf, model_dir=tmp_path)
    for name in ("tiny-codebert", "tiny-bge-m3"):
        add_model(folders[name], tmp_path)
        assert outcomes(load_encoder(directory.find(current, name), current))


def test_a_fresh_process_loads_without_leaving_python_threads_and_closes(shelf: Settings) -> None:
    code = f"""
import os, sys, threading
from autoembed import settings
from autoembed.encoding.load import load_encoder
from autoembed.models.directory import find
directory = {str(shelf.model_dir)!r}
environ = {{"EMBEDDING_MODEL_DIR": directory, "EMBEDDING_THREADS": "1", "EMBEDDING_DEVICE": "cpu"}}
current = settings.read(environ)
encoder = load_encoder(find(current, "tiny-mpnet"), current)
encoder.encode(encoder.tokenize(["one", "two"]), lambda: None)
import torch
assert torch.get_num_threads() == 1
assert threading.active_count() == 1, threading.enumerate()
assert len(os.listdir("/proc/self/task")) == 1, os.listdir("/proc/self/task")
assert os.environ["HF_HUB_OFFLINE"] == os.environ["TRANSFORMERS_OFFLINE"] == "1"
encoder.close()
"""
    single = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    environment = os.environ | {"PYTHONPATH": str(Path(directory.__file__).parents[2])} | single
    environment = {key: value for key, value in environment.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout == ""


def test_closing_frees_the_model(load: Callable[..., Encoder]) -> None:
    before = threading.active_count()
    encoder = load("tiny-mpnet")
    encoder.close()
    with pytest.raises(AttributeError):
        encoder.encode(encoder.tokenize(["text"]), lambda: None)
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("make", "kind"),
    [(made.nan_for, "vector"), (made.zero_for, "vector"), (made.raises_for, "encoder")],
)
def test_only_the_texts_with_the_word_fail(
    make: Callable[[str, Path], Path], kind: str, tmp_path: Path, shelf: Settings
) -> None:
    folder = make("banana", tmp_path)
    current = replace(shelf, model_dir=tmp_path / "shelf")
    add_model(folder, current.model_dir)
    encoder = load_encoder(directory.find(current, folder.name), current)
    texts = [f"text {number}" + " with a banana" * (number in (3, 11)) for number in range(16)]
    done = encode_all(encoder, texts, prompt="", checkpoint=lambda: None)
    failed = {number: outcome.kind for number, outcome in enumerate(done) if isinstance(outcome, Failure)}
    assert failed == {3: kind, 11: kind}


def by_reference(settings: Settings, name: str = "tiny-mpnet", **changes: Any) -> Encoder:
    """The encoder that serves what the packed one does not."""
    return load_encoder(replace(directory.find(settings, name), encoder="sentence-transformers", **changes), settings)


def test_another_precision_than_float32_is_refused(shelf: Settings) -> None:
    with pytest.raises(BrokenModel, match="in float32, not int8"):
        by_reference(shelf, precision="int8")


@pytest.mark.parametrize("name", NAMES)
def test_both_encoders_agree(load: Callable[..., Encoder], shelf: Settings, name: str) -> None:
    mine, theirs = (outcomes(encoder, prompt="query: ") for encoder in (load(name), by_reference(shelf, name)))
    assert [(each.tokens, each.truncated) for each in mine] == [(each.tokens, each.truncated) for each in theirs]
    np.testing.assert_allclose(
        np.stack([each.values for each in mine]), np.stack([each.values for each in theirs]), atol=2e-6
    )


def test_what_cannot_be_loaded_is_a_broken_model(shelf: Settings, tmp_path: Path) -> None:
    model = replace(directory.find(shelf, "tiny-mpnet"), path=tmp_path)
    with pytest.raises(BrokenModel, match="tiny-mpnet"):
        reference_encoder.StEncoder.load(model, shelf, "cpu")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")])
def test_weights_that_do_not_fit_are_a_lack_of_memory(
    shelf: Settings, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(folder: Path, where: str) -> None:
        raise error

    monkeypatch.setattr(reference_encoder, "open_folder", refuse)
    with pytest.raises(OutOfMemory, match="do not fit"):
        by_reference(shelf)


def test_a_missing_package_is_named(shelf: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(MissingPackage, match="sentence_transformers is not installed"):
        by_reference(shelf)


def test_a_failing_pass_gives_memory_back_and_raises(shelf: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise MemoryError

    encoder = by_reference(shelf)
    monkeypatch.setattr(reference_encoder, "encode_texts", refuse)
    with pytest.raises(MemoryError):
        encoder.encode(encoder.tokenize(["text"]), lambda: None)


def test_the_device_is_the_best_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"cpu"}
    monkeypatch.setattr(device, "available", lambda name: name in there)
    assert device.resolve("auto") == "cpu"
    there.add("mps")
    assert device.resolve("auto") == "mps"
    there.add("cuda")
    assert device.resolve("auto") == "cuda"
    assert device.resolve("cpu") == "cpu"
    there.remove("cuda")
    with pytest.raises(DeviceUnavailable, match="EMBEDDING_DEVICE is cuda"):
        device.resolve("cuda")


def test_the_cpu_is_always_available() -> None:
    assert device.available("cpu")
    assert not device.available("tpu")
    assert device.name_of("cpu") == "cpu"
