"""Folders with settings that few models have: whichever encoder `model add` chooses, its vectors are those that
sentence-transformers computes from the published folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import models_for_tests as made
from autoembed import settings
from autoembed.adding.add import Added, add_model
from autoembed.encoding.batching import Vector, encode_all
from autoembed.encoding.load import load_encoder
from autoembed.errors import BrokenModel, UnsupportedModel
from autoembed.models import directory as model_directory
from autoembed.models import manifest as manifests
from autoembed.models.model import PACKED_ENCODER
from unit import lively

CATS = "The cat sleeps on the warm mat all day. " * 40
PHYSICS = "Quantum field theory explains how particles scatter. " * 40
TEXTS = (
    "vacuum removes dead rows",
    "x",
    "",
    "Ärger, İSTANBUL and naïve Café",
    "漢字 and 🦊",
    "[SEP] [CLS] [PAD] [MASK] [UNK] [unused5] </s> <pad> x",
    CATS + PHYSICS,
    " " * 20_000 + PHYSICS,
)

Change = Callable[[Path], None]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def merge(file: str, **content: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / file
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        made.write_json(path, before | content)

    return change


def transformer_settings(**content: Any) -> Change:
    return merge("sentence_bert_config.json", **content)


def tokenizer(**content: Any) -> Change:
    return merge("tokenizer_config.json", **content)


def tokenizer_json(**content: Any) -> Change:
    return merge("tokenizer.json", **content)


def truncation(side: str, **content: Any) -> dict[str, Any]:
    return {"direction": side, "max_length": 32, "strategy": "LongestFirst", "stride": 0, **content}


def added(content: str, number: int, **flags: bool) -> Change:
    """A token that the text may spell out."""
    every = dict.fromkeys(("special", "normalized", "single_word", "lstrip", "rstrip"), False)
    return tokenizer(added_tokens_decoder={str(number): {"content": content, **every, **flags}})


def without_length(folder: Path) -> None:
    (folder / "sentence_bert_config.json").unlink()
    tokenizer(model_max_length=20)(folder)


def second_segment(folder: Path) -> None:
    """Its texts are of the type that BERT gives a pair's second one."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    for each in content["post_processor"]["single"]:
        next(iter(each.values()))["type_id"] = 1
    made.write_json(path, content)
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer(tokenizer_class="PreTrainedTokenizerFast", model_input_names=inputs)(folder)  # BertTokenizer has its own


def halves(folder: Path) -> None:
    made.change_weights(folder, lambda weights: weights.update({key: each.half() for key, each in weights.items()}))


def pooling(**content: Any) -> Change:
    return lambda folder: made.write_json(folder / "1_Pooling" / "config.json", {"embedding_dimension": 32, **content})


def modules(*kinds: str) -> Change:
    """After the transformer; each in a folder of its number and name."""

    def change(folder: Path) -> None:
        listed = [("Transformer", ""), *((kind, f"{place}_{kind}") for place, kind in enumerate(kinds, 1))]
        made.write_modules(folder, listed)
        for _, path in listed[1:]:
            (folder / path).mkdir(exist_ok=True)

    return change


def dense(place: int, activation: str | None, sizes: tuple[int, int] = (32, 24), **config: Any) -> Change:
    def change(folder: Path) -> None:
        import torch
        from safetensors.torch import save_file

        torch.manual_seed(place)
        inputs, outputs = sizes
        content = {"in_features": inputs, "out_features": outputs, "bias": True, **config}
        if activation:
            content["activation_function"] = activation
        made.write_json(folder / f"{place}_Dense" / "config.json", content)
        weights = {"linear.weight": torch.randn(outputs, inputs), "linear.bias": torch.randn(outputs)}
        if config.get("use_residual") and inputs != outputs:
            weights["residual.weight"] = torch.randn(outputs, inputs)
        save_file(weights, folder / f"{place}_Dense" / "model.safetensors")

    return change


def layer_norm(place: int, size: int) -> Change:
    def change(folder: Path) -> None:
        import torch
        from safetensors.torch import save_file

        torch.manual_seed(place)
        made.write_json(folder / f"{place}_LayerNorm" / "config.json", {"dimension": size})
        save_file(
            {"norm.weight": torch.randn(size), "norm.bias": torch.randn(size)},
            folder / f"{place}_LayerNorm" / "model.safetensors",
        )

    return change


def weighted_layers(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    modules("WeightedLayerPooling", "Pooling")(folder)
    merge("config.json", output_hidden_states=True)(folder)
    config = {"word_embedding_dimension": 32, "layer_start": 1, "num_hidden_layers": 2}
    made.write_json(folder / "1_WeightedLayerPooling" / "config.json", config)
    save_file({"layer_weights": torch.tensor([1.0, 3.0])}, folder / "1_WeightedLayerPooling" / "model.safetensors")
    made.write_json(folder / "2_Pooling" / "config.json", {"embedding_dimension": 32, "pooling_mode": "mean"})


def prompts(**content: Any) -> Change:
    return merge("config_sentence_transformers.json", **content)


GELU = "torch.nn.modules.activation.GELU"
IDENTITY = "torch.nn.modules.linear.Identity"

BY_PACKED: dict[str, tuple[Change, ...]] = {
    "truncated on the left": (tokenizer(truncation_side="left"),),
    "truncated on the left by tokenizer.json": (tokenizer_json(truncation=truncation("Left")),),
    "truncated on the left by tokenizer_args": (transformer_settings(tokenizer_args={"truncation_side": "left"}),),
    "truncated on the left by processor_kwargs": (transformer_settings(processor_kwargs={"truncation_side": "left"}),),
    "left in one file and right in another": (
        tokenizer_json(truncation=truncation("Left")),
        tokenizer(truncation_side="right"),
    ),
    "truncation with a stride": (tokenizer_json(truncation=truncation("Right", stride=8)),),
    "padded to a fixed length": (
        tokenizer_json(
            padding={
                "strategy": {"Fixed": 50},
                "direction": "Left",
                "pad_to_multiple_of": 8,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "[PAD]",
            }
        ),
    ),
    "padded on the left": (tokenizer(padding_side="left"),),
    "cased": (tokenizer(do_lower_case=False),),
    "lower case by sentence-transformers": (tokenizer(do_lower_case=False), transformer_settings(do_lower_case=True)),
    "accents kept": (tokenizer(strip_accents=False),),
    "characters of Chinese not apart": (tokenizer(tokenize_chinese_chars=False),),
    "settings of tokenizer_args": (transformer_settings(tokenizer_args={"do_lower_case": False}),),
    "an added token": (added("[unused5]", 6),),
    "an added token that takes blanks": (added("[unused5]", 6, lstrip=True, rstrip=True),),
    "an added word": (added("dead", 7, single_word=True, normalized=True),),
    "no length but the tokenizer's": (without_length,),
    "fewer inputs": (tokenizer(model_input_names=["input_ids", "attention_mask"]),),
    "a length beyond its positions": (transformer_settings(max_seq_length=5000),),
    "settings that decide nothing": (
        transformer_settings(model_args={"attn_implementation": "eager"}, config_args={}, unpad_inputs=False),
    ),
    "settings as they are written today": (
        transformer_settings(
            transformer_task="feature-extraction",
            modality_config={"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
            module_output_name="token_embeddings",
        ),
    ),
    "weights of half precision": (halves,),
    "the last token": (pooling(pooling_mode="lasttoken"),),
    "the weighted mean": (pooling(pooling_mode_weightedmean_tokens=True),),
    "the mean over the root of the length": (pooling(pooling_mode_mean_sqrt_len_tokens=True),),
    "two Dense": (
        modules("Pooling", "Dense", "Dense", "Normalize"),
        pooling(pooling_mode="mean"),
        dense(2, GELU),
        dense(3, IDENTITY, (24, 16)),
    ),
    "LayerNorm": (modules("Pooling", "LayerNorm"), pooling(pooling_mode="cls"), layer_norm(2, 32)),
    "normalised twice": (
        modules("Pooling", "Normalize", "Dense", "LayerNorm", "Dropout", "Normalize"),
        pooling(pooling_mode="mean"),
        dense(3, None),
        layer_norm(4, 24),
        lambda folder: made.write_json(folder / "5_Dropout" / "config.json", {"dropout": 0.5}),
    ),
    "fewer dimensions": (prompts(truncate_dim=16),),
    "fewer dimensions of a normalised vector": (modules("Pooling", "Normalize"), prompts(truncate_dim=8)),
    "more dimensions than there are": (modules("Pooling", "Normalize"), prompts(truncate_dim=999)),
    "prompts": (prompts(prompts={"query": "query: ", "document": "passage: ", "sts": "[SEP] "}),),
    "a default prompt": (prompts(prompts={"passage": "passage: "}, default_prompt_name="passage"),),
}

BY_REFERENCE: dict[str, tuple[tuple[Change, ...], str]] = {
    "special tokens split": ((tokenizer(split_special_tokens=True),), "spell out special tokens"),
    "of the second segment": ((second_segment,), "differ by"),
    "fewer layers by config_args": ((transformer_settings(config_args={"num_hidden_layers": 1}),), "sets config_args"),
    "another activation by config_kwargs": (
        (transformer_settings(config_kwargs={"hidden_act": "relu"}),),
        "sets config_kwargs",
    ),
    "a length by processing_kwargs": (
        (transformer_settings(processing_kwargs={"text": {"max_length": 8}}),),
        "sets processing_kwargs",
    ),
    "two poolings": ((pooling(pooling_mode=["cls", "mean"]),), "pooling cls and mean"),
    "prompts left out of the pooling": (
        (pooling(pooling_mode="mean", include_prompt=False), prompts(prompts={"document": "passage: "})),
        "leaves the prompt out",
    ),
    "an activation of torch's": (
        (
            modules("Pooling", "Dense"),
            pooling(pooling_mode="mean"),
            dense(2, "torch.nn.modules.activation.Softplus"),
        ),
        "its activation",
    ),
    "an activation of its own": (
        (modules("Pooling", "Dense"), pooling(pooling_mode="mean"), dense(2, "their.package.GELU")),
        "its activation",
    ),
    "Dense that adds its input": (
        (modules("Pooling", "Dense"), pooling(pooling_mode="mean"), dense(2, IDENTITY, use_residual=True)),
        "adds its input",
    ),
    "weighted layers": ((weighted_layers,), "second module is no Pooling"),
}


def publish(directory: Path, changes: tuple[Change, ...]) -> Path:
    folder = lively.tiny_bert(directory, "odd")
    for change in changes:
        change(folder)
    return folder


def agree(folder: Path, shelf: Path) -> Added:
    """With the published folder, by every prompt and by none."""
    from sentence_transformers import SentenceTransformer

    found = add_model(folder, shelf)
    current = settings.read({"EMBEDDING_MODEL_DIR": str(shelf), "EMBEDDING_DEVICE": "cpu", "EMBEDDING_THREADS": "1"})
    model = model_directory.find(current, folder.name)
    encoder = load_encoder(model, current)
    oracle = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    oracle.max_seq_length = model.max_tokens
    for prompt in dict.fromkeys(["", *model.prompts.values()]):
        outcomes = encode_all(encoder, TEXTS, prompt=prompt, checkpoint=lambda: None)
        vectors = np.stack([each.values for each in outcomes if isinstance(each, Vector)])
        expected = np.stack([oracle.encode(text, prompt=prompt) for text in TEXTS])
        assert np.abs(vectors - expected).max() <= 1e-5 * np.linalg.norm(expected, axis=1).max()
    return found


@pytest.mark.parametrize("name", BY_PACKED)
def test_served_by_the_packed_encoder(tmp_path: Path, name: str) -> None:
    found = agree(publish(tmp_path, BY_PACKED[name]), tmp_path / "shelf")
    assert (found.manifest.encoder, found.manifest.encoder_note) == (PACKED_ENCODER, "")


@pytest.mark.parametrize("name", BY_REFERENCE)
def test_left_to_sentence_transformers(tmp_path: Path, name: str) -> None:
    changes, why = BY_REFERENCE[name]
    found = agree(publish(tmp_path, changes), tmp_path / "shelf")
    assert why in found.manifest.encoder_note


def test_a_text_beside_others_must_have_its_own_vector(tmp_path: Path) -> None:
    """Which it has not where padding shifts positions and only sentence-transformers could serve the model."""
    folder = publish(tmp_path, (tokenizer(padding_side="left"), pooling(pooling_mode=["cls", "mean"])))
    with pytest.raises(BrokenModel, match="depends on the texts beside it"):
        add_model(folder, tmp_path / "shelf")


def test_fewer_dimensions_are_another_model(tmp_path: Path) -> None:
    folder = publish(tmp_path, (prompts(truncate_dim=16),))
    first = add_model(folder, tmp_path / "shelf")
    prompts(truncate_dim=8)(folder)
    second = add_model(folder, tmp_path / "shelf", name="other")
    assert (first.manifest.dimensions, second.manifest.dimensions) == (16, 8)
    assert first.manifest.fingerprint(64) != second.manifest.fingerprint(64)


@pytest.mark.parametrize("wanted", [0, -1, "16", True])
def test_no_number_of_dimensions(tmp_path: Path, wanted: Any) -> None:
    folder = publish(tmp_path, (prompts(truncate_dim=wanted),))
    with pytest.raises(BrokenModel, match="truncate_dim"):
        add_model(folder, tmp_path / "shelf")


@pytest.mark.parametrize("named", ["passage", "corpus"])
def test_a_prompt_for_passages_is_the_documents_and_the_note_says_so(tmp_path: Path, named: str) -> None:
    folder = publish(tmp_path, (prompts(prompts={"query": "query: ", named: "passage: "}),))
    found = add_model(folder, tmp_path / "shelf").manifest
    assert found.prompts == {"query": "query: ", "document": "passage: ", named: "passage: "}
    current = settings.read({"EMBEDDING_MODEL_DIR": str(tmp_path / "shelf")})
    (entry,) = model_directory.catalog(current)
    assert f'documents get its prompt "{named}"' in str(entry.note)


def test_a_prompt_for_documents_needs_no_note(tmp_path: Path) -> None:
    folder = publish(tmp_path, (prompts(prompts={"document": "d: ", "passage": "p: "}),))
    assert manifests.read(add_model(folder, tmp_path / "shelf").folder).assumed == []


def test_a_tokenizer_of_another_folder_is_refused(tmp_path: Path) -> None:
    folder = publish(tmp_path, (transformer_settings(tokenizer_name_or_path="/srv/other"),))
    with pytest.raises(UnsupportedModel, match="outside of the folder"):
        add_model(folder, tmp_path / "shelf")


def t5(directory: Path, kind: str, *changes: Change) -> Path:
    """Of its kind, the encoder alone or a whole network, of which sentence-transformers loads the encoder."""
    import transformers

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(vocab_size=30522, **sizes)
    folder = lively.transformer(directory / kind, getattr(transformers, kind), config, "mean")
    for change in changes:
        change(folder)
    return folder


SENTENCE_T5 = (
    modules("Pooling", "Dense", "Normalize"),
    pooling(pooling_mode="mean"),
    dense(2, IDENTITY, (32, 24)),
)
INSTRUCTOR = (
    *SENTENCE_T5,
    pooling(pooling_mode="mean", include_prompt=False),
    prompts(prompts={"query": "Represent the question: ", "document": "Represent the text: "}),
)


@pytest.mark.parametrize("kind", ["T5EncoderModel", "T5Model"])
@pytest.mark.parametrize("changes", [(), SENTENCE_T5, INSTRUCTOR], ids=["bare", "sentence-t5", "instructor"])
def test_encoders_of_t5(tmp_path: Path, kind: str, changes: tuple[Change, ...]) -> None:
    found = agree(t5(tmp_path, kind, *changes), tmp_path / "shelf")
    assert found.manifest.architecture == "t5"
    assert "the architecture t5 is not among" in found.manifest.encoder_note


def test_an_encoder_of_t5_that_lacks_weights(tmp_path: Path) -> None:
    folder = t5(tmp_path, "T5EncoderModel")
    made.change_weights(folder, lambda weights: weights.pop("encoder.block.1.layer.0.SelfAttention.q.weight"))
    with pytest.raises(BrokenModel, match="1 are missing"):
        add_model(folder, tmp_path / "shelf")
