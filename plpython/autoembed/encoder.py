"""The one protocol behind which every encoder stands: texts in; vectors, token counts and truncation flags out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from autoembed.models import Model


@dataclass(frozen=True)
class Encoded:
    """One micro-batch's result; tokens count special tokens and the prompt, and are taken before truncation."""

    vectors: NDArray[np.float32]
    tokens: list[int]
    truncated: list[bool]


class Encoder(Protocol):
    """A loaded model. `max_texts` and `token_budget` are the largest micro-batch that it encodes well."""

    model: Model
    device: str
    max_texts: int
    token_budget: int

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, special tokens included, before truncation."""

    def encode(self, texts: Sequence[str], prompt: str = "") -> Encoded:
        """One micro-batch in one forward pass. What it raises is the texts' fault or a lack of memory."""

    def close(self) -> None:
        """Free the weights."""
