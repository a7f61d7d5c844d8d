"""The product's own encoder: packed tokens, from safetensors and tokenizers alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from autoembed.encoding.interrupts import Sparse, nothing
from autoembed.encoding.packed import aliases, kernels, pooling, unread
from autoembed.encoding.packed.int8 import quantize
from autoembed.encoding.packed.layers import LayeredNetwork, halved, serves
from autoembed.encoding.packed.network import Network, Packed, Shape, UnsupportedNetwork
from autoembed.encoding.packed.tokenizer import TextTokenizer
from autoembed.encoding.protocol import Tokenized
from autoembed.errors import BrokenModel, OutOfMemory
from autoembed.models import layout as layouts
from autoembed.process import cpu, memory, threads

if TYPE_CHECKING:
    from autoembed.models.layout import Layout
    from autoembed.models.model import Model
    from autoembed.settings import Settings

# Each pass reads all weights once: fewer tokens would read them more often, and more gain nothing but take memory.
TOKEN_BUDGETS = {"float32": 1024, "bfloat16": 1024, "int8": 2048}
MAX_TEXTS = 512
LOAD_ERRORS = (OSError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError, UnsupportedNetwork)


class Pipeline:
    """A folder's tokenizer, network and heads; UnsupportedNetwork where only sentence-transformers computes it."""

    def __init__(self, layout: Layout, max_tokens: int, precision: str) -> None:
        unread.refuse(layout)
        shape = Shape.of(layout.config)
        self.pool, self.heads = pooling.build(layout, mapped)
        weights = mapped(layout.transformer, CONVERTED_FILES.get(precision))
        self.network = build_network(shape, weights, precision)
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
    """Encodes on the CPU. A micro-batch's texts stand one after another: its cost is the sum of their tokens."""

    device = "cpu"
    max_texts = MAX_TEXTS
    pads = False
    interruptible = True

    def __init__(self, model: Model, pipeline: Pipeline, max_threads: int | None = None) -> None:
        self.model = model
        self.token_budget = TOKEN_BUDGETS[model.precision]
        self.policy = threads.Policy(max_threads, model.bytes)
        self.shared = False
        self._pipeline: Pipeline | None = pipeline

    @classmethod
    def load(cls, model: Model, settings: Settings) -> PackedEncoder:
        if reason := cpu.lacks(model.precision):
            raise BrokenModel(
                name=model.name, reason=reason, hint="Add it again, under another name, without --precision."
            )
        try:
            pipeline = Pipeline(layouts.inspect(model.path, model.name), model.max_tokens, model.precision)
        except MemoryError:
            raise OutOfMemory(name=model.name, reason="its weights do not fit") from None
        except LOAD_ERRORS as error:
            if "allocate memory" in str(error):
                raise OutOfMemory(name=model.name, reason="its weights do not fit") from None
            raise BrokenModel(name=model.name, reason=f"loading it raised {type(error).__name__}: {error}") from error
        return cls(model, pipeline, settings.threads)

    @property
    def pipeline(self) -> Pipeline:
        if self._pipeline is None:
            raise AttributeError("the encoder is closed")
        return self._pipeline

    def tokenize(
        self, texts: Sequence[str], prompt: str = "", checkpoint: Callable[[], None] = nothing
    ) -> list[Tokenized]:
        return self.pipeline.tokenizer.tokenize(texts, prompt, checkpoint)

    def encode(self, texts: Sequence[Tokenized], checkpoint: Callable[[], None]) -> NDArray[np.float32]:
        threads.use(self.policy.threads(sum(text.length for text in texts)))
        if not all(text.length for text in texts):
            raise ValueError("a text without any token has no vector")
        return self.pipeline.encode(texts, Sparse(checkpoint))

    def use_threads(self, fixed: int | None) -> None:
        self.policy = threads.Policy(fixed, self.model.bytes)

    def free_memory(self) -> None:
        self.pipeline.network.space.clear()
        memory.trim()

    def close(self) -> None:
        self._pipeline = None
        memory.trim()


def convert_weights(layout: Layout, precision: str, texts: Sequence[Tokenized]) -> None:
    """Writes the weights of a precision, ready to be mapped and so shared by all processes, in place of the published.

    Raises UnsupportedNetwork for a model that the packed encoder does not serve.
    """
    from safetensors.torch import save_file

    everything = mapped(layout.transformer)
    weights = {name: tensor for name, tensor in everything.items() if name.startswith(("embeddings.", "encoder."))}
    network = Network(Shape.of(layout.config), weights)
    converted = CONVERSIONS[precision](network, weights, Packed.of([text.content for text in texts]))
    save_file(converted, layout.transformer / CONVERTED_FILES[precision])
    for name in layouts.choose_weights(file.name for file in layout.transformer.iterdir()):
        (layout.transformer / name).unlink()


def halve(network: Network, weights: Mapping[str, Tensor], texts: Packed) -> dict[str, Tensor]:  # noqa: ARG001
    """Returns all in bfloat16; where layers.c serves the network, its products as that takes them."""
    kept = dict(weights)
    packed: dict[str, Tensor] = {}
    if kernels.are_quick() and not serves(network.shape):
        for products in (network.shape.names(number).products for number in range(network.shape.layers)):
            for names in products:
                packed |= halved(kept, names)
                kept = {name: kept[name] for name in kept if name.rpartition(".")[0] not in names}
    floats = {name for name, tensor in kept.items() if tensor.dtype.is_floating_point}
    return packed | {name: tensor.bfloat16() if name in floats else tensor.clone() for name, tensor in kept.items()}


CONVERSIONS = {"bfloat16": halve, "int8": quantize}
CONVERTED_FILES = {precision: f"{precision}.safetensors" for precision in CONVERSIONS}


def build_network(shape: Shape, weights: Mapping[str, Tensor], precision: str) -> Network | LayeredNetwork:
    """Builds the network that computes with these weights; torch's, where layers.c does not serve it."""
    packed = any(name.endswith(".panels") for name in weights)
    if precision == "int8" or packed or (precision == "float32" and kernels.are_quick() and not serves(shape)):
        return LayeredNetwork(shape, weights, precision)
    return Network(shape, weights, DTYPES[precision])


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def mapped(folder: Path, converted: str | None = None) -> Mapping[str, Tensor]:
    """Maps a folder's tensors, by name: they cost memory when they are read, and all processes share it."""
    tensors: dict[str, Tensor] = {}
    for name in [converted] if converted else layouts.choose_weights(file.name for file in folder.iterdir()):
        if name.endswith(".safetensors"):
            with safe_open(folder / name, framework="pt") as file:
                tensors.update({aliases.weight(key): file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    return tensors
