"""An encoder without a model: what batching does with its texts can be watched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from autoembed.encoding.protocol import Tokenized
from autoembed.models.model import Model

MODEL = Model(
    name="fake",
    path=Path("/nowhere"),
    dimensions=4,
    max_tokens=100,
    fingerprint="0" * 64,
    architecture="fake",
    precision="float32",
    normalizes=True,
    prompts={"query": "", "document": ""},
    default_prompt=None,
    bytes=0,
)


def vector_of(text: str) -> np.ndarray:
    """One that only this text has."""
    seed = np.random.default_rng(list(text.encode()) or [0])
    vector = seed.standard_normal(MODEL.dimensions).astype(np.float32)
    return vector / np.linalg.norm(vector)


class FakeEncoder:
    """A token a letter. `fault` sees every micro-batch before it is encoded; `bend` changes a text's vector."""

    device = "cpu"

    def __init__(
        self,
        fault: Callable[[Sequence[str]], None] = lambda _: None,
        bend: Callable[[str, np.ndarray], np.ndarray] = lambda _, vector: vector,
        count_fault: Callable[[Sequence[str]], None] = lambda _: None,
        weights: int = 0,
    ) -> None:
        self.model = replace(MODEL, bytes=weights)
        self.max_texts = 8
        self.token_budget = 200
        self.pads = True
        self.interruptible = False
        self.shared = False
        self.batches: list[list[str]] = []
        self.fault, self.bend, self.count_fault = fault, bend, count_fault

    def tokenize(
        self,
        texts: Sequence[str],
        prompt: str = "",
        checkpoint: Callable[[], None] = lambda: None,  # noqa: ARG002
    ) -> list[Tokenized]:
        whole = [prompt + text for text in texts]
        self.count_fault(whole)
        limit = self.model.max_tokens
        return [
            Tokenized(len(text), min(len(text), limit), (prompt, short))
            for text, short in zip(whole, texts, strict=True)
        ]

    def encode(self, texts: Sequence[Tokenized], checkpoint: Callable[[], None]) -> np.ndarray:  # noqa: ARG002
        contents = [text.content[1] for text in texts]
        self.batches.append(contents)
        self.fault(contents)
        vectors = np.empty(len(texts), dtype=object)
        for row, text in enumerate(texts):
            prompt, content = text.content
            vectors[row] = self.bend(content, vector_of(prompt + content))
        return vectors

    def use_threads(self, fixed: int | None) -> None:
        pass

    def free_memory(self) -> None:
        pass

    def close(self) -> None:
        pass
