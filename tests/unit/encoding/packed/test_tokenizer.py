"""Token ids and counts; transformers' tokenizer on the same folder is the oracle."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings

from autoembed.encoding.packed.tokenizer import TextTokenizer
from autoembed.models import layout as layouts
from autoembed.settings import Settings
from unit import lively

NAMES = ("all-MiniLM-L6-v2", "tiny-codebert", "tiny-bge-m3", "tiny-mpnet")
LIMIT = 16

Opened = Callable[[str], TextTokenizer]


def open_one(shelf: Settings, name: str) -> TextTokenizer:
    return TextTokenizer(layouts.tokenizer_file(layouts.inspect(shelf.model_dir / name, name)), LIMIT)


@pytest.fixture(scope="module")
def opened(shelf: Settings) -> Opened:
    return cache(lambda name: open_one(shelf, name))


@pytest.fixture(scope="module")
def oracle(shelf: Settings) -> Callable[[str], Any]:
    from transformers import AutoTokenizer

    return cache(lambda name: AutoTokenizer.from_pretrained(shelf.model_dir / name, local_files_only=True))


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_the_models_own_cut_to_the_limit(opened: Opened, oracle: Callable[[str], Any], name: str) -> None:
    @given(lively.odd_texts(LIMIT))
    @hypothesis_settings(max_examples=100)
    def check(text: str) -> None:
        (found,) = opened(name).tokenize([text])
        assert found.content == oracle(name)(text, truncation=True, max_length=LIMIT)["input_ids"]
        assert found.tokens == len(oracle(name)(text)["input_ids"])
        assert found.length == len(found.content) <= LIMIT
        assert found.truncated == (found.tokens > LIMIT)

    check()


def test_prompts_are_counted(opened: Opened) -> None:
    bare, prompted = (opened("all-MiniLM-L6-v2").tokenize(["vacuum"], prompt)[0] for prompt in ("", "query: "))
    assert (bare.tokens, prompted.tokens) == (3, 5)
    assert prompted.content[3:] == bare.content[1:]


def test_each_text_keeps_its_place_beside_a_long_one(opened: Opened) -> None:
    one = opened("all-MiniLM-L6-v2")
    texts = ["vacuum", "word " * 30_000, "dead rows"]
    together, alone = one.tokenize(texts), [one.tokenize([text])[0] for text in texts]
    assert together == alone
    assert together[1].tokens == 30_002


def test_an_unreadable_tokenizer_is_named_without_its_content(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        TextTokenizer(tmp_path / "tokenizer.json", LIMIT)
