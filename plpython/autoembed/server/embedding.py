"""embed(): texts that a query brings along, in one pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autoembed.encoding import batching
from autoembed.encoding.vectors import to_text
from autoembed.filling.sqlstates import OUT_OF_MEMORY
from autoembed.server.refusals import Refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from autoembed.encoding.protocol import Encoder
    from autoembed.server.loaded_models import LoadedModels


def embed(
    models: LoadedModels,
    model: str | None,
    contents: Sequence[str | None],
    prompt: str | None,
    checkpoint: Callable[[], None],
) -> list[str | None]:
    """Returns the vectors in pgvector's text form, in the texts' order; null stays null."""
    encoder = models.encoder(model)
    texts = [text for text in contents if text is not None]
    outcomes = batching.encode_all(encoder, texts, prompt=prompt_of(encoder, prompt), checkpoint=checkpoint)
    models.count(encoder.model.name, len(texts))
    positions = [position for position, text in enumerate(contents, 1) if text is not None]
    vectors = iter([vector(outcome, position) for position, outcome in zip(positions, outcomes, strict=True)])
    return [None if text is None else next(vectors) for text in contents]


def vector(outcome: batching.Vector | batching.Failure, position: int) -> str:
    if isinstance(outcome, batching.Failure):
        state = OUT_OF_MEMORY if outcome.kind == "memory" else "38000"
        raise Refusal(f"text {position} could not be embedded: {outcome.message}", state)
    return to_text(outcome.values)


def prompt_of(encoder: Encoder, name: str | None) -> str:
    known = encoder.model.prompts
    if name is None:
        name = encoder.model.default_prompt
        return known[name] if name else ""
    if name not in known:
        raise Refusal(
            f"model {encoder.model.name} has no prompt named {name}",
            "22023",
            f"Its prompts are: {', '.join(sorted(known))}.",
        )
    return known[name]
