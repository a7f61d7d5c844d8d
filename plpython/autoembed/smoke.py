"""A first encoding when a model is added: what it shows is recorded, and what is wrong is refused before it is used."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoembed.errors import BrokenModel
from autoembed.layout import Layout
from autoembed.vectors import NORM_TOLERANCE

TEXTS = (
    "a",
    "The quick brown fox jumps over the lazy dog.",
    "SELECT 1;",
    "Ünïcode, 漢字 and 🦊",
    "one two three " * 20,
)
LONG_TEXT = "word "
ALONE_TOLERANCE = 1e-4
UNUSED_WEIGHTS = ("pooler.", "lm_head.", "position_ids")


@dataclass(frozen=True)
class Facts:
    dimensions: int
    max_tokens: int
    position_limit: int


def try_out(layout: Layout, folder: Path) -> Facts:
    from autoembed import st_encoder

    hint = "It was not added."
    try:
        _check_weights(layout, folder)
        transformer = st_encoder.open_folder(folder, "cpu")
        facts = _facts(layout, transformer)
        transformer.max_seq_length = facts.max_tokens
        vectors = _encode(transformer, facts)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, IndexError, ImportError, AttributeError) as error:
        reason = f"trying it out raised {type(error).__name__}: {error}"
        raise BrokenModel(name=layout.name, reason=reason, hint=hint) from error
    problem = _problem(layout, transformer, facts, vectors)
    if problem:
        raise BrokenModel(name=layout.name, reason=problem, hint=hint)
    return facts


def _check_weights(layout: Layout, folder: Path) -> None:
    """transformers fills missing weights with random numbers and only logs it."""
    from autoembed import offline

    offline.prepare()
    from transformers import AutoModel

    logging.getLogger("transformers").setLevel(logging.CRITICAL)
    _, report = AutoModel.from_pretrained(
        folder / layout.modules[0].path, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    missing = [key for key in sorted(report["missing_keys"]) if not any(part in key for part in UNUSED_WEIGHTS)]
    if missing or report["mismatched_keys"]:
        raise ValueError(f"its weights do not fit its architecture ({len(missing)} are missing, first {missing[:1]})")


def _facts(layout: Layout, transformer: Any) -> Facts:
    """The model's own limit, which can be more than it has positions for, or no limit at all."""
    own, positions = transformer.max_seq_length, layout.position_limit
    known = [int(limit) for limit in (own, positions) if limit is not None and limit < 10**9]
    if not known:
        raise ValueError("nothing says how many tokens it takes; set max_seq_length in sentence_bert_config.json")
    return Facts(int(transformer.get_embedding_dimension()), min(known), positions or min(known))


def _encode(transformer: Any, facts: Facts) -> Any:
    from autoembed.st_encoder import count_tokens, encode_texts

    encode_texts(transformer, [LONG_TEXT * min(facts.max_tokens + 8, 600)])
    if count_tokens(transformer, ["a"])[0] < 1:
        raise ValueError("its tokenizer finds no token in a text")
    return encode_texts(transformer, TEXTS)


def _problem(layout: Layout, transformer: Any, facts: Facts, vectors: Any) -> str | None:
    import numpy as np

    from autoembed.st_encoder import encode_texts

    if vectors.shape != (len(TEXTS), facts.dimensions):
        return f"its vectors have {vectors.shape[-1]} dimensions, and it says {facts.dimensions}"
    if not np.isfinite(vectors).all():
        return "its vectors have numbers that are not finite"
    norms = np.linalg.norm(vectors, axis=1)
    if not norms.all():
        return "its vectors are zero"
    if layout.normalizes and np.abs(norms - 1).max() > NORM_TOLERANCE:
        return "its vectors are not of norm 1, although its last module normalises"
    alone = encode_texts(transformer, TEXTS[:1])[0]
    if np.abs(alone - vectors[0]).max() > ALONE_TOLERANCE * norms[0]:
        return "a text's vector depends on the texts beside it"
    return None
