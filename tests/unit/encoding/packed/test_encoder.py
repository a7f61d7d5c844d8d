"""The packed encoder; sentence-transformers, opened by itself on the same folder, is the oracle."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import models_for_tests as made
from autoembed import settings
from autoembed.adding.add import add_model
from autoembed.encoding import interrupts
from autoembed.encoding.batching import Vector, encode_all
from autoembed.encoding.load import load_encoder
from autoembed.encoding.packed import layers
from autoembed.encoding.packed.encoder import PackedEncoder, Pipeline, convert_weights
from autoembed.encoding.packed.network import Shape, UnsupportedNetwork
from autoembed.encoding.reference import StEncoder
from autoembed.models import directory as model_directory
from autoembed.models import layout as layouts
from autoembed.models import manifest as manifests
from autoembed.settings import Settings
from unit import lively

NAMES = ("tiny-bert", "tiny-mpnet", "tiny-codebert", "tiny-bge-m3", "all-MiniLM-L6-v2")
SPELT_OUT = ["[SEP] x [PAD] y [CLS]", "</s> x <pad> y <pad><pad> <s>", "<pad>", "[PAD]", ""]

Vectors = NDArray[np.float32]
SIZES: dict[str, Any] = {
    "vocab_size": 30522, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def lively_shelf(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    published, directory = tmp_path_factory.mktemp("published"), tmp_path_factory.mktemp("lively")
    made.minilm(published)
    for make in (lively.tiny_bert, made.tiny_mpnet, made.tiny_roberta, made.tiny_xlmr):
        lively.enliven(make(published))
    for folder in sorted(published.iterdir()):
        add_model(folder, directory)
    # one thread: on how many cores are free depends in which order a product's sums are added, and so their last bits
    return settings.read({"EMBEDDING_MODEL_DIR": str(directory), "EMBEDDING_DEVICE": "cpu", "EMBEDDING_THREADS": "1"})


@pytest.fixture(scope="module")
def packed_one(lively_shelf: Settings) -> Callable[[str], PackedEncoder]:
    @cache
    def open_one(name: str) -> PackedEncoder:
        encoder = load_encoder(model_directory.find(lively_shelf, name), lively_shelf)
        assert isinstance(encoder, PackedEncoder)
        return encoder

    return open_one


@pytest.fixture(scope="module")
def oracle(lively_shelf: Settings) -> Callable[[str], Any]:
    @cache
    def open_one(name: str) -> Any:
        return reference(lively_shelf.model_dir / name)

    return open_one


def reference(folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu", local_files_only=True)


def nothing() -> None:
    pass


def found(encoder: PackedEncoder, texts: Sequence[str]) -> list[Vector]:
    outcomes = encode_all(encoder, texts, prompt="", checkpoint=nothing)
    vectors = [outcome for outcome in outcomes if isinstance(outcome, Vector)]
    assert len(vectors) == len(texts), outcomes
    return vectors


def values(encoder: PackedEncoder, texts: Sequence[str]) -> Vectors:
    return np.stack([each.values for each in found(encoder, texts)])


@pytest.mark.parametrize("name", NAMES)
def test_vectors_tokens_and_truncation_are_sentence_transformers_own(
    packed_one: Callable[[str], PackedEncoder], oracle: Callable[[str], Any], name: str
) -> None:
    encoder, expected = packed_one(name), oracle(name)
    limit = encoder.model.max_tokens

    @given(st.lists(lively.odd_texts(limit), min_size=1, max_size=6))
    @hypothesis_settings(max_examples=12 if name == "all-MiniLM-L6-v2" else 30)
    @example(SPELT_OUT)
    @example(["word " * count for count in range(limit - 6, limit + 3)])
    @example(["same length"] * 3 + ["other length here"] * 2)
    def check(texts: list[str]) -> None:
        vectors = found(encoder, texts)
        np.testing.assert_allclose(
            np.stack([each.values for each in vectors]), expected.encode(texts, batch_size=32), rtol=2e-6, atol=2e-6
        )
        counts = [len(ids) for ids in expected.tokenizer(texts)["input_ids"]]
        assert [each.tokens for each in vectors] == counts
        assert [each.truncated for each in vectors] == [count > limit for count in counts]

    check()


@pytest.mark.parametrize("name", NAMES)
def test_a_vector_is_its_texts_own_in_any_batch_and_order(
    packed_one: Callable[[str], PackedEncoder], name: str
) -> None:
    encoder = packed_one(name)

    @given(st.lists(lively.odd_texts(60), min_size=2, max_size=8), st.randoms())
    @hypothesis_settings(max_examples=15)
    @example(["one two", "three four", "five six", "one two"], None)
    def check(texts: list[str], chance: Any) -> None:
        together = values(encoder, texts)
        assert np.array_equal(together, values(encoder, texts))
        order = list(range(len(texts)))
        if chance is not None:
            chance.shuffle(order)
        np.testing.assert_allclose(values(encoder, [texts[place] for place in order]), together[order], atol=1e-6)
        alone = np.concatenate([values(encoder, [text]) for text in texts])
        np.testing.assert_allclose(alone, together, atol=1e-6)

    check()


@pytest.mark.parametrize("length", [15, 16, 17, 120, 301, 512])
def test_texts_of_any_length(lively_shelf: Settings, length: int) -> None:
    folder = lively_shelf.model_dir / "all-MiniLM-L6-v2"
    expected = reference(folder)
    expected.max_seq_length = 512
    loaded = opened(folder, 512)
    texts = ["vacuum " * (length - 2), "rows " * (length - 2), "index " * (length - 3) + "Straße"]
    tokenized = loaded.tokenizer.tokenize(texts)
    assert [each.length for each in tokenized][:2] == [length, length]
    np.testing.assert_allclose(loaded.encode(tokenized, nothing), expected.encode(texts), atol=2e-6)


@pytest.mark.parametrize("heads", [2, 4], ids=["attention.c", "torch"])  # which takes no heads of 8
@pytest.mark.parametrize("length", [30, 60, 400])
def test_mpnets_relative_positions_reach_as_far_as_transformers_says(tmp_path: Path, length: int, heads: int) -> None:
    from transformers import MPNetConfig, MPNetModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": heads, "intermediate_size": 64}
    config = MPNetConfig(vocab_size=30522, max_position_embeddings=514, **sizes)
    folder = lively.transformer(tmp_path / "long-mpnet", MPNetModel, config, "mean")
    made.write_json(folder / "sentence_bert_config.json", {"max_seq_length": 512, "do_lower_case": False})
    compare(folder, ["vacuum rows " * (length // 2), "index " * length])


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
def test_poolings(tmp_path: Path, pooling: str) -> None:
    compare(lively.tiny_bert(tmp_path, pooling=pooling))


@pytest.mark.parametrize("pooling", ["mean", ["max"]])
def test_poolings_as_they_are_written_today(tmp_path: Path, pooling: object) -> None:
    folder = lively.tiny_bert(tmp_path)
    made.write_json(folder / "1_Pooling" / "config.json", {"embedding_dimension": 32, "pooling_mode": pooling})
    compare(folder)


@pytest.mark.parametrize("activation", [None, "Identity", "Tanh", "ReLU", "GELU", "Sigmoid"])
def test_dense_activations(tmp_path: Path, activation: str | None) -> None:
    kinds = {"Identity": "linear.Identity"}
    path = activation and f"torch.nn.modules.{kinds.get(activation, f'activation.{activation}')}"
    compare(lively.add_dense(lively.tiny_bert(tmp_path), path, bias=activation != "Identity"))


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "gelu_new"},
        {"hidden_act": "relu"},
        {"hidden_act": "gelu_pytorch_tanh"},
        {"layer_norm_eps": 1e-2},
        {"num_hidden_layers": 1, "num_attention_heads": 8},
    ],
    ids=str,
)
def test_what_config_json_says_is_obeyed(tmp_path: Path, changes: dict[str, Any]) -> None:
    compare(lively.tiny_bert(tmp_path, **changes))


def test_weights_of_a_model_with_a_head_are_found_below_its_name(tmp_path: Path) -> None:
    folder = lively.tiny_bert(tmp_path)
    before = loaded_vectors(folder)

    def publish(weights: dict[str, Any]) -> None:
        for key in list(weights):
            last = key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            weights[f"bert.{last}"] = weights.pop(key)

    made.change_weights(folder, publish)
    assert np.array_equal(loaded_vectors(folder), before)


def compare(folder: Path, texts: Sequence[str] = ("vacuum removes dead rows", "x", "Straße 🦊 " * 40, "")) -> None:
    """Without `model add`, which leaves to sentence-transformers what does not agree."""
    expected = reference(folder)
    vectors = loaded_vectors(folder, texts, expected.max_seq_length)
    np.testing.assert_allclose(vectors, expected.encode(list(texts)), rtol=2e-6, atol=2e-6)


def loaded_vectors(folder: Path, texts: Sequence[str] = ("vacuum removes dead rows",), limit: int = 64) -> Vectors:
    loaded = opened(folder, limit)
    return loaded.encode(loaded.tokenizer.tokenize(list(texts)), nothing)


def opened(folder: Path, limit: int) -> Pipeline:
    return Pipeline(layouts.inspect(folder, "m"), limit, "float32")


def distilbert(directory: Path) -> Path:
    from transformers import DistilBertConfig, DistilBertModel

    config = DistilBertConfig(
        vocab_size=30522, dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=64
    )
    return lively.transformer(directory / "distilbert", DistilBertModel, config, "mean")


def camembert(directory: Path) -> Path:
    from transformers import CamembertConfig, CamembertModel

    config = CamembertConfig(**SIZES, max_position_embeddings=66)
    return lively.transformer(directory / "camembert", CamembertModel, config, "mean")


def electra(directory: Path, width: int = 32) -> Path:
    from transformers import ElectraConfig, ElectraModel

    config = ElectraConfig(**SIZES, embedding_size=width, max_position_embeddings=64)
    return lively.transformer(directory / "electra", ElectraModel, config, "cls")


def narrow_electra(directory: Path) -> Path:
    return electra(directory, 16)


def albert(directory: Path) -> Path:
    from transformers import AlbertConfig, AlbertModel

    config = AlbertConfig(**SIZES, embedding_size=16, max_position_embeddings=64)
    return lively.transformer(directory / "albert", AlbertModel, config, "mean")


def two_poolings(directory: Path) -> Path:
    folder = lively.tiny_bert(directory, "two-poolings")
    made.write_json(folder / "1_Pooling" / "config.json", {"embedding_dimension": 32, "pooling_mode": ["max", "mean"]})
    return folder


def silu(directory: Path) -> Path:
    return lively.tiny_bert(directory, "silu", hidden_act="silu")


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (albert, "the architecture albert is not among"),
        (narrow_electra, "its embeddings are of another width"),
        (two_poolings, "its pooling max and mean is not among mean, cls, max"),
        (silu, "the activation silu is not among"),
    ],
)
def test_what_is_not_computed_here_is_served_by_sentence_transformers_and_says_why(
    make: Callable[[Path], Path], why: str, tmp_path: Path
) -> None:
    folder = make(tmp_path / "published")
    current = settings.read({"EMBEDDING_MODEL_DIR": str(tmp_path / "shelf"), "EMBEDDING_DEVICE": "cpu"})
    add_model(folder, current.model_dir)
    assert why in manifests.read(current.model_dir / folder.name).encoder_note
    (entry,) = model_directory.catalog(current)
    assert entry.status == "ready"
    assert "served by sentence-transformers" in str(entry.note)
    assert why in str(entry.note)
    encoder = load_encoder(model_directory.find(current, folder.name), current)
    assert isinstance(encoder, StEncoder)
    (vector,) = encode_all(encoder, ["vacuum"], prompt="", checkpoint=nothing)
    assert isinstance(vector, Vector)
    np.testing.assert_allclose(vector.values, reference(folder).encode("vacuum"), rtol=2e-6, atol=2e-6)


def test_the_packed_encoder_says_that_it_serves(lively_shelf: Settings) -> None:
    assert {str(entry.note).split(";")[0] for entry in model_directory.catalog(lively_shelf)} == {
        "served by the packed encoder"
    }


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "bert", "position_embedding_type": "relative_key"},
        {"model_type": "bert", "is_decoder": True},
        {"model_type": "roberta", "add_cross_attention": True},
        {"model_type": "deberta"},
    ],
    ids=str,
)
def test_networks_that_would_come_out_wrong_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedNetwork):
        Shape.of(config)


@pytest.mark.parametrize("make", [distilbert, camembert, electra])
def test_near_relatives_of_bert(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    compare(make(tmp_path))


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
@pytest.mark.parametrize("make", [distilbert, camembert, electra])
def test_near_relatives_of_bert_in_other_precisions(
    tmp_path: Path, make: Callable[[Path], Path], precision: str
) -> None:
    folder = make(tmp_path)
    layout, texts = layouts.inspect(folder, "m"), ["vacuum removes dead rows", "x", "Straße 🦊 " * 20]
    tokenized = opened(folder, 64).tokenizer.tokenize(texts)
    expected = reference(folder).encode(texts)
    convert_weights(layout, precision, tokenized)
    found = Pipeline(layout, 64, precision).encode(tokenized, nothing)
    cosines = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosines.min() > 0.99


def in_a_process(code: str, directory: Path, **environment: str) -> str:
    """What it prints. `encoder(name)` and the figures of /proc/self/status, in kB, are there."""
    prelude = f"""
import os, sys
from pathlib import Path
from autoembed import settings
from autoembed.encoding.load import load_encoder
from autoembed.models.directory import find
from autoembed.encoding.batching import encode_all
current = settings.read({{"EMBEDDING_MODEL_DIR": {str(directory)!r}, "EMBEDDING_DEVICE": "cpu"}})
encoder = lambda name: load_encoder(find(current, name), current)
encode = lambda one, texts: encode_all(one, texts, prompt="", checkpoint=lambda: None)
status = lambda field: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))
new_peak = lambda: Path("/proc/self/clear_refs").write_text("5")
"""
    path = {"PYTHONPATH": str(Path(model_directory.__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", prelude + code],
        capture_output=True,
        text=True,
        env=os.environ | path | environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["all-MiniLM-L6-v2", "tiny-bge-m3"])
def test_neither_sentence_transformers_nor_transformers_is_imported(lively_shelf: Settings, name: str) -> None:
    code = f"""
assert len(encode(encoder({name!r}), ["one", "two"])) == 2
print(sorted({{"sentence_transformers", "transformers", "huggingface_hub", "sklearn", "scipy"}} & set(sys.modules)))
"""
    assert in_a_process(code, lively_shelf.model_dir) == "[]\n"


@pytest.mark.parametrize("name", ["all-MiniLM-L6-v2", "tiny-codebert", "tiny-bge-m3"])
def test_a_megabyte_costs_no_more_memory_than_its_truncation(lively_shelf: Settings, name: str) -> None:
    """With and without spaces: the text, its copies and one piece's tokens; and seconds, not minutes."""
    code = f"""
import time
one = encoder({name!r})
encode(one, ["word " * 3000])
encode(one, ["word" * 4000])
for text in ("word " * 200_000, "word" * 250_000):
    one.free_memory()
    new_peak()
    before, started = status("VmHWM"), time.process_time()
    encode(one, [text])
    print(status("VmHWM") - before, time.process_time() - started)
"""
    for line in in_a_process(code, lively_shelf.model_dir).splitlines():
        grown, seconds = map(float, line.split())
        assert grown < 40 * 1024
        assert seconds < 30


def test_ten_thousand_texts_leave_nothing_behind(lively_shelf: Settings) -> None:
    code = """
one = encoder("tiny-mpnet")
def run(rounds):
    for number in range(rounds):
        encode(one, [f"vacuum {number} " * (place % 6) for place in range(100)])
    one.free_memory()
    return status("VmRSS")
before = run(20)
print(run(80) - before)
"""
    assert int(in_a_process(code, lively_shelf.model_dir)) < 8 * 1024


def test_resting_gives_memory_back(lively_shelf: Settings) -> None:
    code = """
one = encoder("all-MiniLM-L6-v2")
encode(one, ["warm"])
one.free_memory()
idle = status("RssAnon")
encode(one, [f"{number} " + "vacuum " * 250 for number in range(8)])
busy = status("RssAnon")
one.free_memory()
print(busy - idle, status("RssAnon") - idle)
"""
    used, kept = map(int, in_a_process(code, lively_shelf.model_dir).split())
    assert used > 10 * 1024
    assert kept < used / 3


class Cancelled(Exception):
    pass


def test_a_micro_batch_can_be_interrupted_within(
    packed_one: Callable[[str], PackedEncoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interrupts, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(layers, "SLICE_FLOP", 0)
    encoder = packed_one("all-MiniLM-L6-v2")
    texts = encoder.tokenize(["vacuum", "rows " * 40])
    calls = []
    whole = encoder.encode(texts, lambda: calls.append(1))
    assert len(calls) == 6
    cancel = Cancelled("by the user")

    def raise_in_the_middle() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise cancel

    calls.clear()
    with pytest.raises(Cancelled) as raised:
        encoder.encode(texts, raise_in_the_middle)
    assert raised.value is cancel
    assert np.array_equal(encoder.encode(texts, nothing), whole)


def test_a_cancel_within_is_no_texts_failure(
    packed_one: Callable[[str], PackedEncoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interrupts, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(layers, "SLICE_FLOP", 0)
    calls = []

    def checkpoint() -> None:
        calls.append(1)
        if len(calls) == 5:
            raise Cancelled

    with pytest.raises(Cancelled):
        encode_all(packed_one("all-MiniLM-L6-v2"), ["vacuum", "rows"], prompt="", checkpoint=checkpoint)
    assert len(calls) == 5


def test_checkpoints_are_not_called_more_often_than_a_cancel_needs(
    packed_one: Callable[[str], PackedEncoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interrupts, "CHECKPOINT_SECONDS", 1000)
    encoder = packed_one("all-MiniLM-L6-v2")
    encoder.encode(encoder.tokenize(["vacuum"]), lambda: pytest.fail("called"))


def test_threads_are_the_policys(packed_one: Callable[[str], PackedEncoder]) -> None:
    import torch

    encoder = packed_one("tiny-mpnet")
    before = torch.get_num_threads()
    try:
        for fixed in (1, 2):
            encoder.use_threads(fixed)
            encoder.encode(encoder.tokenize(["vacuum " * 40] * 4), nothing)
            assert torch.get_num_threads() == fixed
        encoder.use_threads(None)
        encoder.encode(encoder.tokenize(["a query"]), nothing)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
