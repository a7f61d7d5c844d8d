"""Tiny models whose every weight matters, and texts that nobody thinks of.

Fresh random weights are too tame for an oracle: biases are zero, scores are flat, and a wrong layer hides behind the
residual. These have weights of trained models' size.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

import models_for_tests as made

LITERALS = ("[SEP]", "[PAD]", "[CLS]", "[UNK]", "[MASK]", "<pad>", "<s>", "</s>", "<unk>", "<mask>", "##ing", "\u2581")
WORDS = (
    "vacuum", "transactions", "Ünïcode", "naïve", "Straße", "İstanbul", "ΑΣ", "привет", "漢字", "かな", "한국어",
    "שלום", "مرحبا", "नमस्ते", "ไทย", "🦊", "👩‍👩‍👧", "🇩🇪", "e\u0301", "\u202eabc\u202c", "a\u200bb", "don't", "x" * 120,
    "0123456789", "select", "-->", "…", "\ufeff", "\u00ad", "ﬁ", "Ⅷ",
)  # fmt: skip
CONTROLS = ("\x00", "\x07", "\x1b[0m", "\x7f", "\t", "\r\n", "\u0085", "\u2028", "\ufffd", "\ufffe", "\U0010ffff")


def odd_texts(limit: int) -> st.SearchStrategy[str]:
    """From none to more tokens than the limit."""
    pieces = st.sampled_from((*LITERALS, *WORDS, *CONTROLS)) | st.text(max_size=12)
    joined = st.tuples(st.sampled_from(["", " ", "\n"]), st.lists(pieces, max_size=20)).map(
        lambda parts: parts[0].join(parts[1])
    )
    decoded = st.binary(max_size=60).map(lambda raw: raw.decode("latin-1"))
    repeated = st.tuples(st.sampled_from(["a ", "vacuum ", "漢", "🦊 "]), st.integers(0, limit + 8)).map(
        lambda parts: parts[0] * parts[1]
    )
    return joined | st.text(max_size=80) | decoded | repeated


def enliven(folder: Path) -> Path:
    """Other weights for one of the tests' tiny models, pickled ones as safetensors."""
    import torch
    from safetensors.torch import load_file, save_file

    pickled = folder / "pytorch_model.bin"
    weights = torch.load(pickled) if pickled.exists() else load_file(folder / "model.safetensors")
    torch.manual_seed(made.SEED)
    changed = {
        key: _weight(key, tensor.shape) if tensor.is_floating_point() else tensor
        for key, tensor in weights.items()
        if not key.startswith("lm_head.")
    }
    pickled.unlink(missing_ok=True)
    (folder / "model.safetensors").unlink(missing_ok=True)
    save_file(changed, folder / "model.safetensors", {"format": "pt"})
    return folder


def _weight(key: str, shape: Sequence[int]) -> Any:
    import torch

    if key.endswith("LayerNorm.weight"):
        return 1 + 0.2 * torch.randn(shape)
    if "relative_attention_bias" in key or "embeddings" in key or len(shape) == 1:
        return torch.randn(shape) * (1 if len(shape) > 1 else 0.3)
    return torch.randn(shape) / shape[-1] ** 0.5


def tiny_bert(directory: Path, name: str = "tiny-bert", pooling: str = "mean", **changes: Any) -> Path:
    """BERT of 32 dimensions and 64 tokens with MiniLM's vocabulary; not normalised."""
    from transformers import BertConfig, BertModel

    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(**{**settings, "max_position_embeddings": 64, "architectures": ["BertModel"], **changes})
    return transformer(directory / name, BertModel, config, pooling)


def transformer(folder: Path, model: Any, config: Any, pooling: str) -> Path:
    folder.mkdir(parents=True)
    for file in ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(made.packaged_minilm() / file, folder / file)
    model(config).save_pretrained(folder)
    made.write_json(folder / "sentence_bert_config.json", {"max_seq_length": 64, "do_lower_case": False})
    made.write_modules(folder, [("Transformer", ""), ("Pooling", "1_Pooling")])
    made.write_pooling(folder, 32, pooling)
    return enliven(folder)


def add_dense(folder: Path, activation: str | None, *, bias: bool) -> Path:
    """32 to 24 dimensions; None leaves the activation to its default."""
    import torch
    from safetensors.torch import save_file

    dense = folder / "2_Dense"
    dense.mkdir()
    config: dict[str, Any] = {"in_features": 32, "out_features": 24, "bias": bias}
    if activation is not None:
        config["activation_function"] = activation
    made.write_json(dense / "config.json", config)
    torch.manual_seed(made.SEED)
    weights = {"linear.weight": torch.randn(24, 32)} | ({"linear.bias": torch.randn(24)} if bias else {})
    save_file(weights, dense / "model.safetensors")
    made.write_modules(folder, [("Transformer", ""), ("Pooling", "1_Pooling"), ("Dense", "2_Dense")])
    return folder
