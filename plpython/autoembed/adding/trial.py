"""A first encoding when a model is added: what it shows is recorded, and what is wrong is refused before it is used."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoembed.encoding.vectors import NORM_TOLERANCE
from autoembed.errors import BrokenModel
from autoembed.models import layout as layouts
from autoembed.models.layout import Layout
from autoembed.models.model import PACKED_ENCODER

TEXTS = (
    "a",
    "The quick brown fox jumps over the lazy dog.",
    "SELECT 1;",
    "Ünïcode, 漢字 and 🦊",
    "one two three " * 20,
)
LONG_TEXT = "word "
ALONE_TOLERANCE = 1e-4
PACKED_TOLERANCE = 1e-5
# Published costs of a lower precision are about one percent of a search's quality; a broken one is far below this.
LEAST_COSINE = 0.98
UNUSED_WEIGHTS = ("pooler.", "lm_head.", "position_ids")


@dataclass(frozen=True)
class Facts:
    dimensions: int
    max_tokens: int
    position_limit: int
    encoder: str
    encoder_note: str
    vectors: Any
    """Of TEXTS, by sentence-transformers in float32."""


def try_out(layout: Layout, folder: Path) -> Facts:
    from autoembed.encoding import reference

    hint = "It was not added."
    try:
        _check_weights(layout, folder)
        transformer = reference.open_folder(folder, "cpu")
        dimensions, max_tokens, positions = _sizes(layout, transformer)
        transformer.max_seq_length = max_tokens
        vectors = _encode(transformer, max_tokens)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, IndexError, ImportError, AttributeError) as error:
        reason = f"trying it out raised {type(error).__name__}: {error}"
        raise BrokenModel(name=layout.name, reason=reason, hint=hint) from error
    problem = _problem(layout, transformer, dimensions, vectors)
    if problem:
        raise BrokenModel(name=layout.name, reason=problem, hint=hint)
    _keep_tokenizer(layout, transformer)
    note = _packed_differs(layout, max_tokens, vectors)
    return Facts(dimensions, max_tokens, positions, "sentence-transformers" if note else PACKED_ENCODER, note, vectors)


def _check_weights(layout: Layout, folder: Path) -> None:
    """Refuses a model without some weights: transformers fills them with random numbers and only logs it."""
    from autoembed.process import environment

    environment.set_up_libraries()
    from transformers import AutoModel

    logging.getLogger("transformers").setLevel(logging.CRITICAL)
    _, report = AutoModel.from_pretrained(
        folder / layout.modules[0].path, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    missing = [key for key in sorted(report["missing_keys"]) if not any(part in key for part in UNUSED_WEIGHTS)]
    if missing or report["mismatched_keys"]:
        raise ValueError(f"its weights do not fit its architecture ({len(missing)} are missing, first {missing[:1]})")


def _sizes(layout: Layout, transformer: Any) -> tuple[int, int, int]:
    """Returns dimensions, tokens and positions. The model's own limit can exceed its positions, or be none at all."""
    own, positions = transformer.max_seq_length, layout.position_limit
    known = [int(limit) for limit in (own, positions) if limit is not None and limit < 10**9]
    if not known:
        raise ValueError("nothing says how many tokens it takes; set max_seq_length in sentence_bert_config.json")
    return int(transformer.get_embedding_dimension()), min(known), positions or min(known)


def _encode(transformer: Any, max_tokens: int) -> Any:
    from autoembed.encoding.reference import encode_texts, reader

    encode_texts(transformer, [LONG_TEXT * min(max_tokens + 8, 600)])
    if reader(transformer, max_tokens).read(["a"])[0].tokens < 1:
        raise ValueError("its tokenizer finds no token in a text")
    return encode_texts(transformer, TEXTS)


def _problem(layout: Layout, transformer: Any, dimensions: int, vectors: Any) -> str | None:
    import numpy as np

    from autoembed.encoding.reference import encode_texts

    if vectors.shape != (len(TEXTS), dimensions):
        return f"its vectors have {vectors.shape[-1]} dimensions, and it says {dimensions}"
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


def _keep_tokenizer(layout: Layout, transformer: Any) -> None:
    """Writes down what transformers makes of tokenizer.json where its other files add tokens or steps to it."""
    effective = json.loads(transformer.tokenizer.backend_tokenizer.to_str())
    published = layouts.read_json(layout.transformer / layouts.TOKENIZER, layout.name)
    for each in (effective, published):
        each.update(truncation=None, padding=None)
    if effective != published:
        (layout.folder / layouts.EFFECTIVE_TOKENIZER).write_text(json.dumps(effective), encoding="utf-8")


def _packed_differs(layout: Layout, max_tokens: int, vectors: Any) -> str:
    """Returns why the packed encoder does not serve this model; '' where its vectors are sentence-transformers' own."""
    import numpy as np

    from autoembed.encoding.packed.encoder import Pipeline
    from autoembed.encoding.packed.network import UnsupportedNetwork

    try:
        pipeline = Pipeline(layout, max_tokens, "float32")
        found = pipeline.encode(pipeline.tokenizer.tokenize(TEXTS), lambda: None)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, IndexError, UnsupportedNetwork) as error:
        return (
            str(error) if isinstance(error, UnsupportedNetwork) else f"the packed encoder raised {type(error).__name__}"
        )
    largest = np.abs(found - vectors).max() / np.linalg.norm(vectors, axis=1).max()
    return "" if largest <= PACKED_TOLERANCE else f"the packed encoder's vectors differ by {largest:.1g}"


def change_precision(layout: Layout, facts: Facts, precision: str) -> None:
    """Writes the weights in another precision, and tries them out against float32's vectors."""
    import numpy as np

    from autoembed.encoding.packed import encoder as packed
    from autoembed.encoding.packed.network import UnsupportedNetwork
    from autoembed.encoding.packed.tokenizer import TextTokenizer

    if facts.encoder != PACKED_ENCODER:
        reason = f"it has {precision} only in the packed encoder, which does not serve it, since {facts.encoder_note}"
        raise BrokenModel(name=layout.name, reason=reason, hint="Add it without --precision.")
    texts = TextTokenizer(layouts.tokenizer_file(layout), facts.max_tokens).tokenize(TEXTS)
    try:
        packed.convert_weights(layout, precision, texts)
        found = packed.Pipeline(layout, facts.max_tokens, precision).encode(texts, lambda: None)
    except UnsupportedNetwork as error:
        raise BrokenModel(name=layout.name, reason=str(error), hint="Add it without --precision.") from None
    cosines = (found * facts.vectors).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(facts.vectors, axis=1)
    if not cosines.min() >= LEAST_COSINE:
        reason = f"its vectors in {precision} are too far from those in float32 (cosine {cosines.min():.3f})"
        raise BrokenModel(name=layout.name, reason=reason, hint="Add it without --precision.")
