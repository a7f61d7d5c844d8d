"""What sentence-transformers and our encoder make of the machine, and what the machine could do at best.

The model is all-mpnet-base-v2's architecture with random weights, the texts are 30 to 384 tokens of the PostgreSQL
manual. The limit is the model's arithmetic at the rate of its plain matrix products.
"""

import math
import os
import random
import shutil
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import BertWordPieceTokenizer, Tokenizer

from bench.corpus import content, corpus
from bench.reference import no_progress_bars, sentence_transformer
from bench.report import Table, machine, packages, state_folder

LAYERS, WIDTH, INNER, VOCABULARY = 12, 768, 3072, 30527
SHORTEST, LONGEST, TYPICAL, SPREAD = 30, 384, 130, 0.6
SHAPES = ((WIDTH, WIDTH), (WIDTH, 3 * WIDTH), (WIDTH, INNER), (INNER, WIDTH))
PRODUCT_ROWS = 512
NAME = "yardstick-mpnet"
MODEL_REVISION = "1"  # of what build_model makes
BATCH = 32
REFERENCE = f"SentenceTransformer.encode(batch_size={BATCH})"

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Measured:
    texts_per_second: float
    vectors: Vectors

    def least_cosine(self, other: "Measured") -> float:
        mine, theirs = (
            vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in (self.vectors, other.vectors)
        )
        return float((mine * theirs).sum(axis=1).min())


def yardstick(options: Namespace) -> Table:
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(options.threads)
    folder = make_model(state_folder() / "models" / NAME)
    texts, counts = make_texts(folder, options.texts)
    rates = ceilings()
    flop = fmean(map(flop_of, counts))
    limits = {precision: rate * 1e9 / flop for precision, rate in rates.items()}
    return table(measure(folder, texts), limits, rates, counts, options.threads)


def make_model(folder: Path) -> Path:
    """A sentence-transformers folder; made once, and kept in the state directory."""
    stamp = folder / "yardstick"
    if not stamp.exists() or stamp.read_text() != MODEL_REVISION:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        build_model(folder)
        stamp.write_text(MODEL_REVISION)
    return folder


def build_model(folder: Path) -> None:
    from sentence_transformers import SentenceTransformer, models
    from transformers import MPNetConfig, MPNetModel, MPNetTokenizerFast

    no_progress_bars()
    torch.manual_seed(0)
    bare = folder.with_name(f"{NAME}-bare")
    tokenizer = MPNetTokenizerFast(vocab=vocabulary(), do_lower_case=True, model_max_length=512)
    tokenizer.save_pretrained(bare)
    MPNetModel(MPNetConfig(vocab_size=VOCABULARY)).eval().save_pretrained(bare)
    layers = [models.Transformer(str(bare), max_seq_length=LONGEST), models.Pooling(WIDTH), models.Normalize()]
    SentenceTransformer(modules=layers, device="cpu").save(str(folder))
    shutil.rmtree(bare)


def vocabulary() -> dict[str, int]:
    """WordPieces of the manual, filled up to the real model's number."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "[UNK]"]
    trainer = BertWordPieceTokenizer(lowercase=True)
    trainer.train_from_iterator(
        map(content, corpus()), vocab_size=VOCABULARY - 1, special_tokens=special, show_progress=False
    )
    pieces = sorted(trainer.get_vocab(), key=trainer.get_vocab().__getitem__)
    unused = [f"[unused{number}]" for number in range(VOCABULARY - 1 - len(pieces))]
    return {piece: number for number, piece in enumerate([*pieces, *unused, "<mask>"])}


def make_texts(folder: Path, count: int) -> tuple[list[str], list[int]]:
    """Runs of the manual's words whose lengths in tokens are spread as those of real chunks, and those lengths."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    chance = random.Random(0)
    words = " ".join(map(content, corpus())).split()
    texts = []
    for length in lengths(chance, count):
        start = chance.randrange(len(words) - LONGEST)
        run = " ".join(words[start : start + LONGEST])
        end = tokenizer.encode(run, add_special_tokens=False).offsets[length - 3][1]
        texts.append(run[:end])
    return texts, [len(encoding.ids) for encoding in tokenizer.encode_batch(texts)]


def lengths(chance: random.Random, count: int) -> Iterator[int]:
    while count:
        length = round(chance.lognormvariate(math.log(TYPICAL), SPREAD))
        if SHORTEST <= length <= LONGEST:
            count -= 1
            yield length


def flop_of(tokens: int) -> float:
    """Multiplications and additions for one text: matrix products by its tokens, attention by their square."""
    return LAYERS * (tokens * 2.0 * (4 * WIDTH * WIDTH + 2 * WIDTH * INNER) + tokens * tokens * 4.0 * WIDTH)


def ceilings() -> dict[str, float]:
    """GFLOP/s of plain products of the model's weight shapes."""
    products = {
        "float32": float_product(torch.float32),
        "bfloat16": float_product(torch.bfloat16),
        "int8": int8_product,
    }
    with torch.inference_mode():
        return {name: median(rate(product(*shape), *shape) for shape in SHAPES) for name, product in products.items()}


def float_product(dtype: torch.dtype) -> Callable[[int, int], Callable[[], object]]:
    def product(inputs: int, outputs: int) -> Callable[[], object]:
        tokens = torch.randn(PRODUCT_ROWS, inputs).to(dtype)
        weights = torch.randn(outputs, inputs).to(dtype)
        return lambda: torch.nn.functional.linear(tokens, weights)

    return product


def int8_product(inputs: int, outputs: int) -> Callable[[], object]:
    tokens = torch.randint(-128, 127, (PRODUCT_ROWS, inputs), dtype=torch.int8)
    weights = torch.randint(-128, 127, (outputs, inputs), dtype=torch.int8)
    return lambda: torch._int_mm(tokens, weights.T)


def rate(product: Callable[[], object], inputs: int, outputs: int, repeats: int = 12) -> float:
    return 2.0 * PRODUCT_ROWS * inputs * outputs / min(timed(product) for _ in range(repeats)) / 1e9


def timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def measure(folder: Path, texts: list[str]) -> dict[str, Measured]:
    reference = sentence_transformer(folder)
    found = {}
    for size in (BATCH, 8):
        encode = partial(reference.encode, batch_size=size, show_progress_bar=False)
        found[f"SentenceTransformer.encode(batch_size={size})"] = measured(encode, texts)
    return found | {"the encoder of pg_autoembed": measured(our_encoder(folder), texts)}


def our_encoder(folder: Path) -> Callable[[list[str]], Vectors]:
    """In batches of 32, as a call of embed_pending(32) has them."""
    from autoembed import batching, install, models, settings

    directory = folder.parent / "registered"
    directory.mkdir(exist_ok=True)
    install.add(folder, directory, name=NAME, force=True)
    current = settings.read({"EMBEDDING_MODEL_DIR": str(directory), "EMBEDDING_DEVICE": "cpu"})
    encoder = models.load(models.find(current, NAME), current)

    def encode(texts: list[str]) -> Vectors:
        outcomes = [
            outcome
            for start in range(0, len(texts), BATCH)
            for outcome in batching.encode_all(
                encoder, texts[start : start + BATCH], prompt="", checkpoint=lambda: None
            )
        ]
        return np.stack([outcome.values for outcome in outcomes if isinstance(outcome, batching.Vector)])

    return encode


def measured(encode: Callable[[list[str]], Vectors], texts: list[str]) -> Measured:
    """After one pass over a few texts to warm up."""
    encode(texts[:8])
    started = time.perf_counter()
    vectors = encode(texts)
    return Measured(len(texts) / (time.perf_counter() - started), vectors)


def table(
    found: dict[str, Measured], limits: dict[str, float], rates: dict[str, float], counts: list[int], threads: int
) -> Table:
    reference = found[REFERENCE]
    encoders = tuple(
        (
            name,
            f"{one.texts_per_second:.2f}",
            f"{one.texts_per_second / reference.texts_per_second:.2f}",
            f"{one.texts_per_second / limits['float32']:.0%}",
            f"{one.least_cosine(reference):.6f}",
        )
        for name, one in found.items()
    )
    ceiling = tuple(
        (
            f"limit of the machine, {precision} ({rates[precision]:.0f} GFLOP/s)",
            f"{limit:.2f}",
            f"{limit / reference.texts_per_second:.2f}",
            f"{limit / limits['float32']:.0%}",
            "",
        )
        for precision, limit in limits.items()
    )
    figures: dict[str, Any] = {
        "texts": len(counts),
        "tokens": {"least": min(counts), "mean": round(fmean(counts), 1), "most": max(counts)},
        "gflop_per_text": round(fmean(map(flop_of, counts)) / 1e9, 2),
        "threads": threads,
        "gflop_per_second": rates,
        "texts_per_second": {name: one.texts_per_second for name, one in found.items()},
        "limit_texts_per_second": limits,
    }
    return Table(
        title="Encoding: all-mpnet-base-v2's architecture, float32, on the CPU",
        columns=("how", "texts/s", "ratio", "of the float32 limit", "least cosine"),
        rows=(*encoders, *ceiling),
        notes=(
            f"{len(counts)} texts of {min(counts)} to {max(counts)} tokens, mean {fmean(counts):.0f}, "
            f"{figures['gflop_per_text']} GFLOP each; {threads} threads; random weights",
            packages(),
            machine(),
        ),
        figures=figures,
    )
