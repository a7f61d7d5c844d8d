"""Texts to token ids by a model's tokenizer.json."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING

from autoembed.encoding.interrupts import nothing
from autoembed.encoding.protocol import Tokenized
from autoembed.encoding.reading import Reader, Side

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class TextTokenizer:
    """Makes ids of texts, cut to the limit, which counts special tokens, on the side that the file names."""

    def __init__(self, file: Path, limit: int) -> None:
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # noqa: BLE001 -- the Rust code raises nothing narrower
            raise ValueError(f"{file.name} cannot be read: {error}") from None
        self.side = side_of(tokenizer)
        self.reader = Reader(tokenizer, limit, self.side)

    def of_limit(self, limit: int) -> TextTokenizer:
        """Returns the same tokenizer with another limit."""
        other = copy(self)
        other.reader = Reader(self.reader.tokenizer, limit, self.side)
        return other

    def tokenize(
        self, texts: Sequence[str], prompt: str = "", checkpoint: Callable[[], None] = nothing
    ) -> list[Tokenized]:
        readings = self.reader.read(texts, prompt, checkpoint)
        return [Tokenized(reading.tokens, len(reading.ids), reading.ids) for reading in readings]


def side_of(tokenizer: Tokenizer) -> Side:
    truncation = tokenizer.truncation or {}
    return "left" if str(truncation.get("direction", "")).lower() == "left" else "right"
