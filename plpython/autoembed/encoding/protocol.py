"""The one protocol behind which every encoder stands: texts in; token counts first, then vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from autoembed.encoding.interrupts import nothing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from autoembed.models.model import Model


@dataclass(frozen=True)
class Tokenized:
    """A text with its prompt, ready to be encoded; special tokens count. `content` is its encoder's own.

    `tokens` is taken before truncation, and of a very long text it is how many there are at least; `length` is what the
    model will see.
    """

    tokens: int
    length: int
    content: Any

    @property
    def truncated(self) -> bool:
        return self.tokens > self.length


class Encoder(Protocol):
    """A loaded model. `max_texts` and `token_budget` are the largest micro-batch that it encodes well.

    Where it `pads`, a micro-batch costs as many tokens as if all its texts were as long as the longest. An encoder
    that is `interruptible` calls `checkpoint` every few tenths of a second; what that raises it lets pass. The weights
    of a `shared` one are the postmaster's.
    """

    model: Model
    device: str
    max_texts: int
    token_budget: int
    pads: bool
    interruptible: bool
    shared: bool

    def tokenize(
        self, texts: Sequence[str], prompt: str = "", checkpoint: Callable[[], None] = nothing
    ) -> list[Tokenized]:
        """Tokenizes. What it raises is the texts' fault or a lack of memory; long texts have checkpoints."""

    def encode(self, texts: Sequence[Tokenized], checkpoint: Callable[[], None]) -> NDArray[np.float32]:
        """Encodes one micro-batch in one forward pass: (texts, dimensions). What it raises is as above."""

    def use_threads(self, fixed: int | None) -> None:
        """Sets their number; None leaves it to the encoder. A model preloaded before a fork was loaded with one."""

    def free_memory(self) -> None:
        """Frees the memory that only encoding needs."""

    def close(self) -> None:
        """Frees the weights, too. Not for `shared` ones, which other processes use."""
