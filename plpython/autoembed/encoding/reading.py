"""Reads what a model reads of a text, in memory that its limit bounds, and in steps between which a cancel acts.

A tokenizer keeps dozens to hundreds of bytes for each character, and thirty million of them take it twenty seconds. A
model reads the first tokens alone, or the last ones; how many characters these are, only the tokenizer can tell: a
thousand spaces may be no token at all, and a word of a thousand letters a single one. So a long text is tokenized in
pieces that grow until enough of their tokens are sure, which no character outside of the piece could change.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Literal

from autoembed.encoding.interrupts import Sparse, nothing

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

Side = Literal["left", "right"]

# Characters of a first piece, of which there are more where the model reads many tokens.
PIECE, PIECE_PER_TOKEN = 16_384, 8
GROWTH = 4
# A piece grows to this, and its memory with it. A word that is longer is read as if it ended where a piece does.
LARGEST_PIECE = 65_536
# How far a character reaches into other words: special tokens that a text spells out are shorter, and so is all that a
# normalizer composes.
MARGIN = 256
# How many tokens of a word that is longer than the largest piece are not sure.
UNSETTLED = 512
# Characters beyond those that are read which are tokenized as well, to be counted.
COUNTED = 262_144
BLANK = re.compile(r"\s")
WORD_END = re.compile(r"(?<=\S)\s")
PROBES = ("a", "1", ".", "the")


@dataclass(frozen=True)
class Reading:
    """Holds the `ids` that the model reads, and how many `tokens` the whole text has; special tokens count.

    Of a text with more characters than are counted, `tokens` is how many it has at least. `text` is so much of it as
    gives these ids, without the prompt.
    """

    ids: list[int]
    tokens: int
    text: str


@dataclass(frozen=True)
class Piece:
    """Holds ids of a long text, the characters that give them, and how many characters are done with."""

    ids: list[int]
    text: str
    reach: int


class Reader:
    """Reads by a tokenizer up to a limit, which counts special tokens, and truncates on one side."""

    def __init__(self, tokenizer: Tokenizer, limit: int, side: Side = "right") -> None:
        self.tokenizer = tokenizer
        self.before, self.after = special_tokens(tokenizer)
        self.special = len(self.before) + len(self.after)
        self.room = max(0, limit - self.special)
        self.end: Head | Tail = Tail() if side == "left" else Head()
        self.first = max(PIECE, PIECE_PER_TOKEN * limit)
        self.largest = max(LARGEST_PIECE, self.first)

    def read(self, texts: Sequence[str], prompt: str = "", checkpoint: Callable[[], None] = nothing) -> list[Reading]:
        """Returns readings in the order of the texts; calls `checkpoint` between the steps of long ones."""
        unbound(self.tokenizer)
        checkpoint = Sparse(checkpoint)
        whole = [prompt + text for text in texts]
        short = iter(self.encode([text for text in whole if len(text) <= self.first]))
        return [
            self.reading(next(short).ids, text)
            if len(prompted) <= self.first
            else self.read_long(prompted, len(prompt), checkpoint)
            for text, prompted in zip(texts, whole, strict=True)
        ]

    def encode(self, texts: list[str]) -> list[Encoding]:
        encodings: list[Encoding] = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return encodings

    def reading(self, ids: list[int], text: str, uncounted: int = 0) -> Reading:
        read = self.end.kept(ids, self.room)
        return Reading([*self.before, *read, *self.after], len(ids) + uncounted + self.special, text)

    def read_long(self, whole: str, prompt: int, checkpoint: Callable[[], None]) -> Reading:
        pieces = self.end.ordered(list(self.pieces(whole, checkpoint)))
        ids = [each for piece in pieces for each in piece.ids]
        unread = self.end.beyond(whole, sum(piece.reach for piece in pieces))
        return self.reading(ids, self.enough(whole, prompt, pieces, ids), self.count(unread, checkpoint))

    def pieces(self, whole: str, checkpoint: Callable[[], None]) -> Iterator[Piece]:
        """Yields pieces from the end that the model reads, until there are enough tokens or no more characters."""
        place, kept, size = 0, 0, self.first
        while True:
            checkpoint()
            start, end = self.end.bounds(whole, place, size)
            text = whole[start:end]
            found = self.tokenizer.encode(text, add_special_tokens=False)
            if place + size >= len(whole):
                yield Piece(found.ids, text, len(text))
                return
            sure = self.end.sure(found, text)
            if kept + sure >= self.room:
                yield Piece(self.end.kept(found.ids, sure), text, self.end.reach(found, text, sure))
                return
            if size < self.largest:
                size = min(GROWTH * size, self.largest)
                continue
            sure, reach = self.advance(found, text, sure)
            start, end = self.end.bounds(text, 0, reach if sure else 0)
            yield Piece(self.end.kept(found.ids, sure), text[start:end], reach)
            place, kept = place + reach, kept + sure

    def advance(self, found: Encoding, text: str, sure: int) -> tuple[int, int]:
        """Returns how many tokens of a largest piece are kept, and how many of its characters are done with: some."""
        if reach := self.end.reach(found, text, sure):
            return sure, reach
        if self.end.is_whole(found, text):
            return len(found), len(text)
        settled = max(0, len(found) - UNSETTLED)
        if reach := self.end.reach(found, text, settled):
            return settled, reach
        return 0, len(text) - MARGIN  # blanks, or a long word that is few tokens, which are found where it ends

    def enough(self, whole: str, prompt: int, pieces: Sequence[Piece], ids: list[int]) -> str:
        """Returns so much of the text as gives these ids; without what is no token, where the rest gives them."""
        if len(pieces) > 1:
            text = "".join(piece.text for piece in pieces).removeprefix(whole[:prompt])
            found = self.tokenizer.encode(whole[:prompt] + text, add_special_tokens=False).ids
            if self.end.kept(found, self.room) == self.end.kept(ids, self.room):
                return text
        last = self.end.ordered(pieces)[-1]
        start, end = self.end.bounds(whole, 0, sum(piece.reach for piece in pieces) - last.reach + len(last.text))
        return whole[max(start, prompt) : end]

    def count(self, text: str, checkpoint: Callable[[], None]) -> int:
        """Counts tokens; where a piece ends inside of a word, some too many or too few."""
        tokens = 0
        for piece in cut(text[:COUNTED]):
            checkpoint()
            tokens += len(self.encode([piece])[0])
        return tokens


class Head:
    """Reads a text's first tokens."""

    def bounds(self, text: str, place: int, size: int) -> tuple[int, int]:
        return place, min(place + size, len(text))

    def beyond(self, text: str, reached: int) -> str:
        return text[reached:]

    def kept(self, ids: list[int], count: int) -> list[int]:
        return ids[:count]

    def ordered(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Turns the order of reading into that of the text, and back."""
        return list(pieces)

    def sure(self, found: Encoding, text: str) -> int:
        """Returns how many of a piece's tokens do not depend on what comes after it: those of words that have ended."""
        words = found.word_ids
        sure = min(bisect_right(found.offsets, len(text) - MARGIN, key=itemgetter(1)), len(words) - 1)
        while sure > 0 and words[sure - 1] == words[sure]:
            sure -= 1
        return max(0, sure)

    def reach(self, found: Encoding, text: str, count: int) -> int:  # noqa: ARG002
        """Returns how many characters the first tokens take."""
        return found.offsets[count - 1][1] if count else 0

    def is_whole(self, found: Encoding, text: str) -> bool:
        """Says whether the last word has ended, as far as the piece shows it."""
        blank = text[-1].isspace() and not text.isspace()
        return blank or self.reach(found, text, len(found)) <= len(text) - MARGIN


class Tail:
    """Reads a text's last tokens: the mirror image of `Head`."""

    def bounds(self, text: str, place: int, size: int) -> tuple[int, int]:
        return max(0, len(text) - place - size), len(text) - place

    def beyond(self, text: str, reached: int) -> str:
        return text[: len(text) - reached]

    def kept(self, ids: list[int], count: int) -> list[int]:
        return ids[len(ids) - min(count, len(ids)) :]

    def ordered(self, pieces: Sequence[Piece]) -> list[Piece]:
        return list(pieces)[::-1]

    def sure(self, found: Encoding, text: str) -> int:
        """Trusts what follows a blank: tokenizers read from left to right, and some take digits three at a time."""
        blank = WORD_END.search(text, MARGIN)
        return len(found) - bisect_left(found.offsets, blank.start(), key=itemgetter(0)) if blank else 0

    def reach(self, found: Encoding, text: str, count: int) -> int:
        return len(text) - found.offsets[len(found) - count][0] if count else 0

    def is_whole(self, found: Encoding, text: str) -> bool:
        blank = text[0].isspace() and not text.isspace()
        return blank or self.reach(found, text, len(found)) <= len(text) - MARGIN


def cut(text: str) -> Iterator[str]:
    """Yields pieces that end before white space, where there is some in their last quarter."""
    start = 0
    while start < len(text):
        end = start + PIECE
        if end < len(text):
            blanks = [found.start() for found in BLANK.finditer(text, end - PIECE // 4, end)]
            end = blanks[-1] if blanks else end
        yield text[start:end]
        start = end


def unbound(tokenizer: Tokenizer) -> None:
    """Lets it neither cut nor pad: sentence-transformers sets both again whenever it encodes."""
    tokenizer.no_truncation()
    tokenizer.no_padding()


def special_tokens(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Returns those that go before a text's own tokens, and those after them."""
    unbound(tokenizer)
    for probe in PROBES:
        own, whole = tokenizer.encode(probe, add_special_tokens=False).ids, tokenizer.encode(probe).ids
        for start in range(len(whole) - len(own) + 1):
            if own and whole[start : start + len(own)] == own:
                return whole[:start], whole[start + len(own) :]
    raise ValueError("its tokenizer does not put special tokens around a text")
