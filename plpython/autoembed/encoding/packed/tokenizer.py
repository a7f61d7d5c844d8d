"""Texts to token ids, in memory bounded by the model's limit whatever the text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from autoembed.encoding.protocol import Tokenized

if TYPE_CHECKING:
    from tokenizers import Encoding

# Characters given to the tokenizer at once: it keeps dozens of bytes for each of them, and hundreds for each token.
PIECE = 16_384
PIECE_PER_TOKEN = 32  # and enough of them that the first piece has all the tokens that the model sees
BLANK = re.compile(r"\s")


class TextTokenizer:
    """A model's tokenizer.json; `limit` counts special tokens, and ids are cut to it.

    A long text is taken in pieces. Its ids come from the first one; the others are only counted, and where a piece
    ends inside of a word the count may be some tokens off.
    """

    def __init__(self, file: Path, limit: int) -> None:
        from tokenizers import Tokenizer

        try:
            self.tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # noqa: BLE001 -- the Rust code raises nothing narrower
            raise ValueError(f"{file.name} cannot be read: {error}") from None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.limit = limit
        self.special: int = self.tokenizer.num_special_tokens_to_add(is_pair=False)
        self.piece = max(PIECE, PIECE_PER_TOKEN * limit)

    def tokenize(self, texts: Sequence[str], prompt: str = "") -> list[Tokenized]:
        pieces = [self._pieces(prompt + text) for text in texts]
        firsts = self._encode([next(each) for each in pieces])
        return [self._tokenized(first, rest) for first, rest in zip(firsts, pieces, strict=True)]

    def _tokenized(self, first: Encoding, rest: Iterator[str]) -> Tokenized:
        tokens = len(first) + self.special + sum(len(self._encode([piece])[0]) for piece in rest)
        first.truncate(max(0, self.limit - self.special))
        ids = self.tokenizer.post_process(first).ids
        return Tokenized(tokens, len(ids), ids)

    def _encode(self, pieces: list[str]) -> list[Encoding]:
        encodings: list[Encoding] = self.tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
        return encodings

    def _pieces(self, text: str) -> Iterator[str]:
        """Cut before white space, where there is some in a piece's last quarter; one empty piece of an empty text."""
        start = 0
        while start == 0 or start < len(text):
            end = start + self.piece
            if end < len(text):
                blanks = [found.start() for found in BLANK.finditer(text, end - self.piece // 4, end)]
                end = blanks[-1] if blanks else end
            yield text[start:end]
            start = end
