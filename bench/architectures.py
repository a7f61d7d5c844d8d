"""Models of published architectures with random weights, and texts of known lengths: how fast a model is does not
depend on what it has learnt. Made once, and kept in the state directory.
"""

import json
import math
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import BertWordPieceTokenizer, Tokenizer

from bench.corpus import content, corpus
from bench.reference import no_progress_bars
from bench.report import state_folder

VOCABULARY = 30527
SHORTEST, LONGEST, TYPICAL, SPREAD = 30, 384, 130, 0.6
TEXTS = 512
REVISION = "3"  # of what is made here
STAMP = "made"


@dataclass(frozen=True)
class Architecture:
    """`kind` is the prefix of its classes in transformers; `limit` counts tokens."""

    name: str
    published: str
    kind: str
    layers: int
    width: int
    inner: int
    heads: int
    limit: int

    def flop(self, tokens: int) -> float:
        """Multiplications and additions for one text: matrix products by its tokens, attention by their square."""
        products = 2.0 * (4 * self.width * self.width + 2 * self.width * self.inner)
        return self.layers * (tokens * products + tokens * tokens * 4.0 * self.width)

    def folder(self) -> Path:
        folder = state_folder() / "models" / self.name
        if not (folder / STAMP).exists() or (folder / STAMP).read_text() != REVISION:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            self._build(folder)
            (folder / STAMP).write_text(REVISION)
        return folder

    def _build(self, folder: Path) -> None:
        import torch
        import transformers
        from sentence_transformers import SentenceTransformer, models

        no_progress_bars()
        torch.manual_seed(0)
        bare = folder.with_name(f"{folder.name}-bare")
        tokenizer = transformers.MPNetTokenizerFast(vocab=vocabulary(), do_lower_case=True, model_max_length=self.limit)
        tokenizer.save_pretrained(bare)
        config = getattr(transformers, f"{self.kind}Config")(**self._shape())
        getattr(transformers, f"{self.kind}Model")(config).eval().save_pretrained(bare)
        layers = [models.Transformer(str(bare), max_seq_length=self.limit), models.Pooling(self.width)]
        SentenceTransformer(modules=[*layers, models.Normalize()], device="cpu").save(str(folder))
        shutil.rmtree(bare)

    def _shape(self) -> dict[str, Any]:
        return {
            "vocab_size": VOCABULARY,
            "num_hidden_layers": self.layers,
            "hidden_size": self.width,
            "intermediate_size": self.inner,
            "num_attention_heads": self.heads,
            "max_position_embeddings": 514,
            "pad_token_id": 1,
            "bos_token_id": 0,
            "eos_token_id": 2,
        }


MPNET = Architecture("bench-mpnet", "all-mpnet-base-v2", "MPNet", 12, 768, 3072, 12, 384)
CODEBERT = Architecture("bench-codebert", "codebert-base", "Roberta", 12, 768, 3072, 12, 512)
BGE_M3 = Architecture("bench-bge-m3", "bge-m3", "XLMRoberta", 24, 1024, 4096, 16, 512)


@cache
def words() -> list[str]:
    return " ".join(map(content, corpus())).split()


def vocabulary() -> dict[str, int]:
    """WordPieces of the manual, filled up to all-mpnet-base-v2's number."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "[UNK]"]
    trainer = BertWordPieceTokenizer(lowercase=True)
    trainer.train_from_iterator(
        map(content, corpus()), vocab_size=VOCABULARY - 1, special_tokens=special, show_progress=False
    )
    pieces = sorted(trainer.get_vocab(), key=trainer.get_vocab().__getitem__)
    unused = [f"[unused{number}]" for number in range(VOCABULARY - 1 - len(pieces))]
    return {piece: number for number, piece in enumerate([*pieces, *unused, "<mask>"])}


def texts(folder: Path, count: int) -> list[str]:
    """The first of the texts whose lengths in tokens are spread as those of real chunks."""
    file = state_folder() / "models" / f"texts-{REVISION}.json"
    if not file.exists():
        chance = random.Random(0)
        file.write_text(json.dumps(texts_of(folder, list(chunk_lengths(chance, TEXTS)))))
    kept: list[str] = json.loads(file.read_text())
    return kept[:count]


def texts_of(folder: Path, lengths: list[int]) -> list[str]:
    """Runs of the manual's words with so many of the model's tokens, special ones included."""
    tokenizer = _tokenizer(folder)
    chance = random.Random(1)
    found = []
    for length in lengths:
        start = chance.randrange(len(words()) - length)
        run = " ".join(words()[start : start + length])
        end = tokenizer.encode(run, add_special_tokens=False).offsets[length - 3][1]
        found.append(run[:end])
    return found


def token_counts(folder: Path, texts: list[str], limit: int) -> list[int]:
    """As the model sees them."""
    return [min(len(encoding.ids), limit) for encoding in _tokenizer(folder).encode_batch(texts)]


def chunk_lengths(chance: random.Random, count: int) -> Iterator[int]:
    while count:
        length = round(chance.lognormvariate(math.log(TYPICAL), SPREAD))
        if SHORTEST <= length <= LONGEST:
            count -= 1
            yield length


def _tokenizer(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
