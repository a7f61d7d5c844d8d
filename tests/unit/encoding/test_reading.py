"""What a model reads of a long text; the tokens of the whole text, made at once, are the oracle."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from autoembed.encoding import interrupts, reading
from autoembed.encoding.batching import encode_all
from autoembed.encoding.protocol import Encoder
from autoembed.encoding.reading import Reader, Side
from unit import lively, tokenizers_for_tests

LIMIT = 16
SIDES: tuple[Side, ...] = ("left", "right")

made_once = cache(lambda name: tokenizers_for_tests.KINDS[name]())
kinds = pytest.mark.parametrize("kind", tokenizers_for_tests.KINDS)
sides = pytest.mark.parametrize("side", SIDES)

LONG_PIECES = (
    " " * 700, "\n" * 300, " \t\n" * 200, "\u00a0 " * 200, "a" * 900, "aab" * 250, "7" * 800, "x=[1,2];" * 80,
    "漢字" * 300, "[SEP] " * 60, "<s></s><|endoftext|>" * 30,
    "🦊👩‍👩‍👧" * 60, "e" + "\u0301" * 400, "wor" + "\x00" * 300 + "d", "\u200b" * 300,
    "vacuum removes dead rows. " * 20, "row,1,2;abc\n" * 40,
)  # fmt: skip


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that short texts are long ones."""
    monkeypatch.setattr(reading, "PIECE", 256)
    monkeypatch.setattr(reading, "LARGEST_PIECE", 16_384)
    monkeypatch.setattr(reading, "MARGIN", 96)


def texts() -> st.SearchStrategy[str]:
    pieces = st.sampled_from(LONG_PIECES) | lively.odd_texts(LIMIT)
    return st.lists(pieces, min_size=1, max_size=6).flatmap(
        lambda parts: st.sampled_from(["", " ", "\n"]).map(lambda between: between.join(parts))
    )


@kinds
@sides
def test_what_is_read_is_what_the_whole_texts_tokens_begin_or_end_with(
    small_pieces: None, kind: str, side: Side
) -> None:
    reader = Reader(made_once(kind), LIMIT, side)

    @given(texts())
    @hypothesis_settings(max_examples=60)
    @example(" " * 6000 + "giraffe in the garden")
    @example("giraffe in the garden" + " " * 6000)
    @example("a" * 6000 + " giraffe in the garden")
    @example("giraffe " + "a" * 6001 + " in the garden")
    @example("".join(LONG_PIECES))
    @example("\n".join(LONG_PIECES[::-1]))
    def check(text: str) -> None:
        (found,) = reader.read([text])
        assert found.ids == expected(reader, text)
        assert expected(reader, found.text) == found.ids

    check()


def expected(reader: Reader, text: str) -> list[int]:
    ids = reader.tokenizer.encode(text, add_special_tokens=False).ids
    kept = ids[: reader.room] if isinstance(reader.end, reading.Head) else ids[max(0, len(ids) - reader.room) :]
    return [*reader.before, *kept, *reader.after]


@kinds
@sides
def test_a_prompt_is_read_with_the_text_and_no_part_of_it(small_pieces: None, kind: str, side: Side) -> None:
    reader = Reader(made_once(kind), LIMIT, side)
    for text in (" " * 6000 + "giraffe", "vacuum " * 2000, "a" * 3000 + " b"):
        (found,) = reader.read([text], "query: ")
        assert found.ids == expected(reader, "query: " + text) == expected(reader, "query: " + found.text)
        assert text.startswith(found.text) or text.endswith(found.text)


@kinds
def test_words_and_blanks_of_twenty_thousand_characters(kind: str) -> None:
    reader = Reader(made_once(kind), 64)
    for text in (" " * 16_384 + "giraffe", "a" * 20_003 + " giraffe", "漢字" * 10_001 + " x", "1" * 20_000 + " x"):
        assert reader.read([text])[0].ids == expected(reader, text)


@pytest.mark.parametrize("blank", [" ", "\n", " \t", "\x00"])
def test_no_number_of_blanks_hides_what_follows(small_pieces: None, blank: str) -> None:
    """More of them than the largest piece has room for."""
    text = "see" + blank * 40_000 + " giraffe in the garden"
    reader = Reader(made_once("wordpiece"), LIMIT)
    (found,) = reader.read([text])
    assert found.ids == expected(reader, text)
    assert (found.tokens, len(found.text)) <= (len(found.ids), 35_000)


def test_a_word_longer_than_the_largest_piece_hides_nothing(small_pieces: None) -> None:
    reader = Reader(made_once("wordpiece"), LIMIT)
    text = "a" * 60_000 + " giraffe"
    assert reader.read([text])[0].ids == expected(reader, text)


def test_only_so_much_is_tokenized_as_is_read_or_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "COUNTED", 20_000)
    reader = Reader(made_once("wordpiece"), LIMIT)
    (found,) = reader.read(["word " * 1_000_000])
    assert found.ids == expected(reader, "word " * 20)
    assert len(found.text) == reading.PIECE
    assert 4_000 < found.tokens < 8_000


@sides
@kinds
def test_tokens_are_counted_beyond_those_that_are_read(small_pieces: None, kind: str, side: Side) -> None:
    reader = Reader(made_once(kind), LIMIT, side)
    text = "vacuum removes dead rows,\nand Straße and 漢字 " * 200
    tokens = len(reader.tokenizer.encode(text).ids)
    assert abs(reader.read([text])[0].tokens - tokens) <= tokens / 30


def test_every_step_of_a_long_text_is_one_at_which_a_cancel_acts(
    small_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interrupts, "CHECKPOINT_SECONDS", 0)
    steps: list[int] = []
    reader = Reader(made_once("wordpiece"), LIMIT)
    reader.read(["vacuum", "rows"], checkpoint=lambda: steps.append(1))
    assert not steps
    reader.read([" " * 100_000 + "vacuum"], checkpoint=lambda: steps.append(1))
    assert len(steps) >= 100_000 / reading.LARGEST_PIECE


class Cancelled(Exception):
    pass


@pytest.mark.parametrize("name", ["all-MiniLM-L6-v2", "served-by-sentence-transformers"])
def test_a_cancel_while_a_text_is_tokenized_is_no_texts_failure(
    load: Callable[..., Encoder], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(interrupts, "CHECKPOINT_SECONDS", 0)
    encoder, calls = load(name), []

    def checkpoint() -> None:
        calls.append(1)
        if len(calls) == 4:
            raise Cancelled

    with pytest.raises(Cancelled):
        encode_all(encoder, ["vacuum", " " * 1_000_000], prompt="", checkpoint=checkpoint)
    assert len(calls) == 4


@pytest.mark.parametrize("name", ["all-MiniLM-L6-v2", "served-by-sentence-transformers"])
def test_what_stands_behind_blanks_or_a_long_word_decides_the_vector(load: Callable[..., Encoder], name: str) -> None:
    encoder = load(name)
    pairs = [(" " * 200_000, ""), ("a" * 20_000 + " ", "a" * 200 + " ")]
    for long, short in pairs:
        found: list[Any] = encode_all(
            encoder, [f"{each}giraffe in the garden" for each in (long, short)], prompt="", checkpoint=lambda: None
        )
        assert abs(found[0].values - found[1].values).max() < 1e-6


def test_special_tokens_are_found_around_a_text() -> None:
    for kind, special in (("wordpiece", 2), ("byte-level BPE", 2), ("BPE without words", 1), ("no special tokens", 0)):
        reader = Reader(made_once(kind), LIMIT)
        assert reader.special == special
        assert reader.read([""])[0].ids == reader.tokenizer.encode("").ids
