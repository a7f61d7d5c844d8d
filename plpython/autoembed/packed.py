"""The product's own encoder: packed tokens, from safetensors and tokenizers alone."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from autoembed import head, memory, threads
from autoembed import layout as layouts
from autoembed.encoder import Tokenized
from autoembed.errors import BrokenModel, OutOfMemory
from autoembed.network import Network, Packed, Shape, UnsupportedNetwork
from autoembed.tokens import TextTokenizer

if TYPE_CHECKING:
    from autoembed.layout import Layout
    from autoembed.models import Model
    from autoembed.settings import Settings

# Each pass reads all weights once: fewer tokens would read them more often, more of them gain nothing.
TOKEN_BUDGET = 2048
MAX_TEXTS = 512
CHECKPOINT_SECONDS = 0.2
# Published weights are often those of a model with a head, below its name.
PREFIX = re.compile(r"^(bert|roberta|mpnet)\.")
LOAD_ERRORS = (OSError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError, UnsupportedNetwork)


class Loaded:
    """A folder's tokenizer, network and head; UnsupportedNetwork where only sentence-transformers computes it."""

    def __init__(self, layout: Layout, max_tokens: int) -> None:
        shape = Shape.read(layout.config)
        weights = mapped(layout.transformer)
        self.pool, self.heads = head.read(layout, mapped)
        self.network = Network(shape, weights)
        self.tokenizer = TextTokenizer(layouts.tokenizer_file(layout), max_tokens)

    def encode(self, texts: Sequence[Tokenized], checkpoint: Callable[[], None]) -> NDArray[np.float32]:
        packed = Packed.of([text.content for text in texts])
        with torch.inference_mode():
            vectors = self.pool(self.network(packed, checkpoint), packed)
            for module in self.heads:
                vectors = module(vectors)
        found: NDArray[np.float32] = vectors.numpy()
        return found


class PackedEncoder:
    """On the CPU. A micro-batch's texts stand one after another: its cost is the sum of their tokens."""

    device = "cpu"
    max_texts = MAX_TEXTS
    token_budget = TOKEN_BUDGET
    pads = False
    interruptible = True

    def __init__(self, model: Model, loaded: Loaded, max_threads: int | None = None) -> None:
        self.model = model
        self.policy = threads.Policy(max_threads)
        self._loaded: Loaded | None = loaded

    @classmethod
    def load(cls, model: Model, settings: Settings) -> PackedEncoder:
        try:
            loaded = Loaded(layouts.inspect(model.path, model.name), model.max_tokens)
        except MemoryError:
            raise OutOfMemory(name=model.name, reason="its weights do not fit") from None
        except LOAD_ERRORS as error:
            if "allocate memory" in str(error):
                raise OutOfMemory(name=model.name, reason="its weights do not fit") from None
            raise BrokenModel(name=model.name, reason=f"loading it raised {type(error).__name__}: {error}") from error
        return cls(model, loaded, settings.threads)

    @property
    def loaded(self) -> Loaded:
        if self._loaded is None:
            raise AttributeError("the encoder is closed")
        return self._loaded

    def tokenize(self, texts: Sequence[str], prompt: str = "") -> list[Tokenized]:
        return self.loaded.tokenizer.tokenize(texts, prompt)

    def encode(self, texts: Sequence[Tokenized], checkpoint: Callable[[], None]) -> NDArray[np.float32]:
        torch.set_num_threads(self.policy.threads(sum(text.length for text in texts)))
        return self.loaded.encode(texts, Sparse(checkpoint))

    def use_threads(self, fixed: int | None) -> None:
        self.policy = threads.Policy(fixed)

    def rest(self) -> None:
        self.loaded.network.space.clear()
        memory.trim()

    def close(self) -> None:
        self._loaded = None
        memory.trim()


class Sparse:
    """Calls the checkpoint, which costs a query and a commit, only as often as a cancel must be seen."""

    def __init__(self, checkpoint: Callable[[], None]) -> None:
        self.checkpoint = checkpoint
        self.called = time.monotonic()

    def __call__(self) -> None:
        if time.monotonic() - self.called >= CHECKPOINT_SECONDS:
            self.checkpoint()
            self.called = time.monotonic()


def mapped(folder: Path) -> Mapping[str, Tensor]:
    """A folder's tensors by name, as their file is mapped: they cost memory when they are read, and all share it."""
    tensors: dict[str, Tensor] = {}
    for name in layouts.choose_weights(file.name for file in folder.iterdir()):
        if name.endswith(".safetensors"):
            with safe_open(folder / name, framework="pt") as file:
                tensors.update({PREFIX.sub("", key): file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    return tensors
