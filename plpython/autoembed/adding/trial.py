"""A first encoding when a model is added: what it shows is recorded, and what is wrong is refused before it is used."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoembed.encoding.vectors import NORM_TOLERANCE
from autoembed.errors import AutoembedError, BrokenModel
from autoembed.models import layout as layouts
from autoembed.models.layout import Layout
from autoembed.models.model import PACKED_ENCODER

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from autoembed.encoding.packed.encoder import Pipeline

    Vectors = NDArray[np.float32]

TEXTS = (
    "a",
    "The quick brown fox jumps over the lazy dog.",
    "SELECT 1;",
    "Ünïcode, 漢字 and 🦊",
    "one two three " * 20,
)
ODD = (
    "",
    " ",
    "VACUUM removes Dead Rows",
    "Ärger, İSTANBUL, ΑΣ, naïve Café, ﬁ Ⅷ e\u0301",
    "  two\n\nlines\t\u00a0 ",
    "1,234.5 %",
)
UNLIKE_ENDS = " ".join(f"row {number} of many" for number in range(200))
PROMPTED = ("vacuum removes dead rows", "")
SHORT_LIMIT = 32
"""A long text is cut to so many tokens in no time, whatever the model's own limit."""
MOST_TOKENS = 600
"""A text that is not cut has no more: attention to thousands takes minutes."""
ALONE_TOLERANCE = 1e-4
PACKED_TOLERANCE = 1e-5
# Published costs of a lower precision are about one percent of a search's quality; a broken one is far below this.
LEAST_COSINE = 0.98
UNUSED_WEIGHTS = ("pooler.", "lm_head.", "position_ids")
LONGEST_REASON = 300
NOT_ADDED = "It was not added."


@dataclass(frozen=True)
class Case:
    """Texts by which a setting shows that only one of the two encoders obeys."""

    what: str
    texts: tuple[str, ...]
    limit: int
    prompt: str = ""


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
    try:
        return _try_out(layout, folder)
    except (AutoembedError, OSError) as error:
        if isinstance(error, OSError) and error.errno is None:  # by which transformers names what it does not find
            raise _broken(layout, error) from error
        raise
    except Exception as error:  # whatever libraries raise for a damaged or foreign model; this never runs in the server
        raise _broken(layout, error) from error


def _broken(layout: Layout, error: Exception) -> BrokenModel:
    reason = f"trying it out raised {type(error).__name__}: {error}".splitlines()[0][:LONGEST_REASON]
    return BrokenModel(name=layout.name, reason=reason, hint=NOT_ADDED)


def _try_out(layout: Layout, folder: Path) -> Facts:
    from autoembed.encoding import reference

    logging.getLogger("transformers").setLevel(logging.CRITICAL)
    transformer = reference.open_folder(folder, "cpu")
    _check_weights(layout, transformer, folder)
    dimensions, max_tokens, positions = _sizes(layout, transformer)
    _check_tokens(transformer, max_tokens)
    cases = list(_cases(layout, transformer, max_tokens))
    found = [_encode(transformer, case) for case in cases]
    transformer.max_seq_length = max_tokens
    if problem := _problem(layout, dimensions, found[0]):
        raise BrokenModel(name=layout.name, reason=problem, hint=NOT_ADDED)
    _keep_tokenizer(layout, transformer)
    note = _packed_differs(layout, cases, found)
    if note and (problem := _depends_on_others(transformer, found[0])):
        raise BrokenModel(name=layout.name, reason=problem, hint=NOT_ADDED)
    return Facts(dimensions, max_tokens, positions, "sentence-transformers" if note else PACKED_ENCODER, note, found[0])


def _check_weights(layout: Layout, transformer: Any, folder: Path) -> None:
    """Refuses a model without some weights: transformers fills them with random numbers and only logs it.

    It asks the very class that sentence-transformers has chosen, which of some models loads the encoder alone.
    """
    network = transformer[0].auto_model
    _, report = type(network).from_pretrained(
        folder / layout.modules[0].path,
        config=network.config,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
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


def _check_tokens(transformer: Any, max_tokens: int) -> None:
    from autoembed.encoding.reference import reader

    if reader(transformer, max_tokens).read(["a"])[0].tokens < 1:
        raise ValueError("its tokenizer finds no token in a text")


def _cases(layout: Layout, transformer: Any, max_tokens: int) -> Iterator[Case]:
    """Yields what is compared; the first one has the texts of which the vectors are kept."""
    tokenizer, most = transformer.tokenizer, min(max_tokens, MOST_TOKENS)
    special = dict.fromkeys([*tokenizer.all_special_tokens, *sorted(tokenizer.get_added_vocab())])
    spelt = [f"{token} x {token}{token} Y" for token in [*special][:20]]
    yield Case("texts", TEXTS, most)
    yield Case("odd texts", ODD, most)
    yield Case("texts that spell out special tokens", (*spelt, " ".join(special)), most)
    yield Case("texts longer than the model reads", (UNLIKE_ENDS, *spelt), min(SHORT_LIMIT, most))
    yield Case("long texts", (UNLIKE_ENDS,), most)
    for name, prompt in layouts.prompts(layout.folder, layout.name)[0].items():
        if prompt:
            yield Case(f"texts with the prompt {name}", PROMPTED, most, prompt)


def _encode(transformer: Any, case: Case) -> list[Vectors | None]:
    """Encodes each text alone; None where there is nothing to agree with: of no token, or of one without weights."""
    from autoembed.encoding.reference import encode_texts, reader

    transformer.max_seq_length = case.limit
    found: list[Vectors | None] = []
    for text, reading in zip(case.texts, reader(transformer, case.limit).read(case.texts, case.prompt), strict=True):
        try:
            found.append(encode_texts(transformer, [text], case.prompt)[0] if reading.ids else None)
        except (IndexError, RuntimeError):
            if case.texts is TEXTS:
                raise
            found.append(None)
    return found


def _problem(layout: Layout, dimensions: int, vectors: list[Vectors | None]) -> str | None:
    import numpy as np

    found = [vector for vector in vectors if vector is not None]
    if len(found) < len(vectors) or any(vector.shape != (dimensions,) for vector in found):
        return f"its vectors have {found[0].shape[-1] if found else 0} dimensions, and it says {dimensions}"
    if not np.isfinite(found).all():
        return "its vectors have numbers that are not finite"
    norms = np.linalg.norm(found, axis=1)
    if not norms.all():
        return "its vectors are zero"
    if layout.normalizes and np.abs(norms - 1).max() > NORM_TOLERANCE:
        return "its vectors are not of norm 1, although its last module normalises"
    return None


def _depends_on_others(transformer: Any, alone: list[Vectors | None]) -> str | None:
    """Returns why sentence-transformers, which pads, cannot serve the model; the packed encoder pads no text."""
    import numpy as np

    from autoembed.encoding.reference import encode_texts

    together = encode_texts(transformer, TEXTS)
    if np.abs(together - alone).max() > ALONE_TOLERANCE * np.linalg.norm(together, axis=1).max():
        return "a text's vector depends on the texts beside it"
    return None


def _keep_tokenizer(layout: Layout, transformer: Any) -> None:
    """Writes down what transformers makes of tokenizer.json by the model's other files, where it is another one."""
    effective = json.loads(transformer.tokenizer.backend_tokenizer.to_str())
    published = layouts.read_json(layout.transformer / layouts.TOKENIZER, layout.name)
    effective["truncation"] = _truncation(transformer.tokenizer.truncation_side)
    published["truncation"] = _truncation((published.get("truncation") or {}).get("direction"))
    for each in (effective, published):
        each["padding"] = None
    if effective != published:
        (layout.folder / layouts.EFFECTIVE_TOKENIZER).write_text(json.dumps(effective), encoding="utf-8")


def _truncation(side: str | None) -> dict[str, Any] | None:
    """Returns what of it decides ids; how long a text may be is the settings' to say."""
    left = {"direction": "Left", "max_length": SHORT_LIMIT, "strategy": "LongestFirst", "stride": 0}
    return left if str(side).lower() == "left" else None


def _packed_differs(layout: Layout, cases: list[Case], expected: list[list[Vectors | None]]) -> str:
    """Returns why the packed encoder does not serve this model; '' where its vectors are sentence-transformers' own."""
    from autoembed.encoding.packed.encoder import Pipeline
    from autoembed.encoding.packed.network import UnsupportedNetwork

    try:
        pipeline = Pipeline(layout, cases[0].limit, "float32")
        for case, vectors in zip(cases, expected, strict=True):
            if not (largest := _difference(pipeline, case, vectors)) <= PACKED_TOLERANCE:
                return f"the packed encoder's vectors of {case.what} differ by {largest:.1g}"
    except UnsupportedNetwork as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 -- a reason to leave the model to the other encoder, whatever it is
        return f"the packed encoder raised {type(error).__name__}"
    return ""


def _difference(pipeline: Pipeline, case: Case, expected: list[Vectors | None]) -> float:
    import numpy as np

    known = {text: vector for text, vector in zip(case.texts, expected, strict=True) if vector is not None}
    if not known:
        return 0.0
    vectors = np.stack(list(known.values()))
    found = pipeline.encode(pipeline.tokenizer.of_limit(case.limit).tokenize(list(known), case.prompt), lambda: None)
    return float(np.abs(found - vectors).max() / np.linalg.norm(vectors, axis=1).max())


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
