"""Tokenizers of each kind that published models have, trained on a few lines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

import models_for_tests as made

LINES = [made.TEXT, "漢字かな한국어 привет 🦊 " * 3, "aaaa aa aaaaaaaa aaaaaaaaaaaaaaaa         x  y\n\n\n z"]
THREE_DIGITS = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # as Llama 3 and Qwen
)


def trained(model: Any, trainer: Any, normalizer: Any = None, pre_tokenizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


def wordpiece() -> Tokenizer:
    return Tokenizer.from_file(str(made.packaged_minilm() / "tokenizer.json"))


def bpe(pre_tokenizer: Any = None, normalizer: Any = None, alphabet: Any = ()) -> Tokenizer:
    specials = ["<s>", "</s>", "<unk>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=specials, initial_alphabet=list(alphabet), show_progress=False
    )
    model = models.BPE() if alphabet else models.BPE(unk_token="<unk>", fuse_unk=True)
    return trained(model, trainer, normalizer, pre_tokenizer)


def byte_level(*, prefix: bool = False) -> Tokenizer:
    tokenizer = bpe(pre_tokenizers.ByteLevel(add_prefix_space=prefix), alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0))
    return tokenizer


def three_digits() -> Tokenizer:
    split = pre_tokenizers.Split(Regex(THREE_DIGITS), "isolated")
    return bpe(
        pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]),
        alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )


def without_words() -> Tokenizer:
    """As Gemma's: to its model a text is one word, and what it has not seen is fused into one token."""
    tokenizer = bpe(pre_tokenizers.Split(" ", "merged_with_previous"), normalizers.Replace(" ", "\u2581"))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def unigram(pre_tokenizer: Any) -> Tokenizer:
    trainer = trainers.UnigramTrainer(
        vocab_size=200, unk_token="<unk>", special_tokens=["<s>", "</s>", "<unk>"], show_progress=False
    )
    collapsing = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer = trained(models.Unigram(), trainer, collapsing, pre_tokenizer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return tokenizer


def by_blanks() -> Tokenizer:
    return unigram(pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]))


KINDS: Mapping[str, Callable[[], Tokenizer]] = {
    "wordpiece": wordpiece,
    "byte-level BPE": byte_level,
    "byte-level BPE with a first space": lambda: byte_level(prefix=True),
    "no special tokens": three_digits,
    "BPE without words": without_words,
    "unigram by blanks": by_blanks,
    "unigram": lambda: unigram(pre_tokenizers.Metaspace()),
}
