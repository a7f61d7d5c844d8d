"""BERT's family of encoders on packed tokens: all texts' tokens in one matrix, none of them padding.

Matrix products see every token of a micro-batch at once; only attention goes text by text. The architectures differ
in their weights' names, in their positions, and in MPNet's bias by relative position:
BERT (Devlin et al. 2018), RoBERTa (Liu et al. 2019), XLM-RoBERTa (Conneau et al. 2019), MPNet (Song et al. 2020).
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from autoembed.encoding.packed import aliases, kernels
from autoembed.encoding.packed.kernels import pointers

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": torch.ops.aten.gelu_,
    "gelu_new": lambda values: torch.ops.aten.gelu_(values, approximate="tanh"),
    "gelu_pytorch_tanh": lambda values: torch.ops.aten.gelu_(values, approximate="tanh"),
    "relu": torch.relu_,
}
FLOAT = torch.float32
NORMED_AT_ONCE = 128
"""Rows whose norms stay in the processor's cache until they are written back."""
LANES = 16
"""attention.c takes heads whose size is a multiple of this."""


class UnsupportedNetwork(Exception):
    """Raised for what this module cannot compute: sentence-transformers serves such a model. The message says why."""


@dataclass(frozen=True)
class Names:
    """Names say where an architecture keeps its weights, below `encoder.layer.N.`"""

    query: str
    key: str
    value: str
    output: str
    attention_norm: str


BERT_NAMES = Names(
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "attention.output.LayerNorm",
)
MPNET_NAMES = Names(
    "attention.attn.q", "attention.attn.k", "attention.attn.v", "attention.attn.o", "attention.LayerNorm"
)


@dataclass(frozen=True)
class LayerNames:
    """The same of one layer, in full; query, key and value stand side by side and are one product."""

    joined: list[str]
    output: str
    attention_norm: str
    up: str
    down: str
    norm: str

    @property
    def products(self) -> list[list[str]]:
        return [self.joined, [self.output], [self.up], [self.down]]


BERTS = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra")
NAMES = {**dict.fromkeys(BERTS, BERT_NAMES), "mpnet": MPNET_NAMES}
OFFSET = ("roberta", "xlm-roberta", "camembert", "mpnet")  # position ids begin after the padding token's id


@dataclass(frozen=True)
class Shape:
    """What config.json says about a network."""

    architecture: str
    width: int
    inner: int
    layers: int
    heads: int
    epsilon: float
    activation: str
    padding: int
    buckets: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """Reads config.json; refuses what is not computed here. A missing key has its architecture's default."""
        architecture = str(config["model_type"])
        if architecture not in NAMES:
            raise UnsupportedNetwork(f"the architecture {architecture} is not among {', '.join(NAMES)}")
        config = aliases.config(config)
        if architecture == "electra" and config["embedding_size"] != config["hidden_size"]:
            raise UnsupportedNetwork("its embeddings are of another width than its layers")
        activation = config.get("hidden_act", "gelu")
        if activation not in ACTIVATIONS:
            raise UnsupportedNetwork(f"the activation {activation} is not among {', '.join(ACTIVATIONS)}")
        if config.get("position_embedding_type", "absolute") != "absolute":
            raise UnsupportedNetwork("its positions are not absolute")
        if config.get("is_decoder") or config.get("add_cross_attention"):
            raise UnsupportedNetwork("it is a decoder")
        return cls(
            architecture=architecture,
            width=config.get("hidden_size", 768),
            inner=config.get("intermediate_size", 3072),
            layers=config.get("num_hidden_layers", 12),
            heads=config.get("num_attention_heads", 12),
            epsilon=config.get("layer_norm_eps", 1e-12),
            activation=activation,
            padding=config.get("pad_token_id", 1 if architecture in OFFSET else 0),
            buckets=config.get("relative_attention_num_buckets", 32),
        )

    @property
    def head(self) -> int:
        return self.width // self.heads

    def names(self, number: int) -> LayerNames:
        """Returns the names of the weights of one layer."""
        names, prefix = NAMES[self.architecture], f"encoder.layer.{number}."
        return LayerNames(
            joined=[prefix + part for part in (names.query, names.key, names.value)],
            output=prefix + names.output,
            attention_norm=prefix + names.attention_norm,
            up=f"{prefix}intermediate.dense",
            down=f"{prefix}output.dense",
            norm=f"{prefix}output.LayerNorm",
        )


@dataclass(frozen=True)
class Packed:
    """Texts as one row of token ids (T), and how long each is."""

    ids: Tensor
    lengths: list[int]

    @classmethod
    def of(cls, texts: Sequence[Sequence[int]]) -> Packed:
        """Packs texts in the order given."""
        return cls(torch.tensor(list(chain.from_iterable(texts))), [len(text) for text in texts])

    @property
    def bounds(self) -> Tensor:
        """Returns where each text starts (texts + 1): the next one's start is its end."""
        return torch.tensor([0, *accumulate(self.lengths)])

    def split(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Splits the rows of a matrix (T, ...), text by text."""
        return torch.split_with_sizes(tokens, self.lengths)


class Norm:
    """Layer normalization over the width, in place (Ba et al. 2016)."""

    def __init__(
        self, weights: Mapping[str, Tensor], name: str, epsilon: float, dtype: torch.dtype = torch.float32
    ) -> None:
        self.weight = weight_of(weights, name, "weight").to(dtype)
        self.bias = weight_of(weights, name, "bias").to(dtype)
        self.epsilon = epsilon

    def __call__(self, tokens: Tensor) -> Tensor:
        for rows in torch.split(tokens, NORMED_AT_ONCE):
            rows.copy_(functional.layer_norm(rows, self.weight.shape, self.weight, self.bias, self.epsilon))
        return tokens


class Workspace:
    """The big matrices between layers, kept: new ones for each product would cost a page fault per 4 kB."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._kept: dict[str, Tensor] = {}

    def take(self, name: str, rows: int, columns: int, dtype: torch.dtype | None = None) -> Tensor:
        """Returns a matrix in the place of what had this name before."""
        (matrix,) = self.split(name, rows, columns, dtype=dtype)
        return matrix

    def split(self, name: str, rows: int, *columns: int, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Returns several matrices, in the place of one."""
        sizes = [rows * each for each in columns]
        if name not in self._kept or self._kept[name].numel() < sum(sizes):
            self._kept.pop(name, None)  # or both would be there for a moment
            self._kept[name] = torch.empty(sum(sizes), dtype=dtype or self.dtype)
        parts = self._kept[name][: sum(sizes)].split_with_sizes(sizes)
        return [part.view(rows, each) for part, each in zip(parts, columns, strict=True)]

    def clear(self) -> None:
        self._kept.clear()


class Embeddings:
    def __init__(self, shape: Shape, weights: Mapping[str, Tensor]) -> None:
        self.words = weights["embeddings.word_embeddings.weight"]
        self.positions = weights["embeddings.position_embeddings.weight"]
        kinds = weights.get("embeddings.token_type_embeddings.weight")
        self.kind = None if kinds is None else kinds[0]
        self.norm = Norm(weights, "embeddings.LayerNorm", shape.epsilon)
        self.padding = shape.padding if shape.architecture in OFFSET else None

    def __call__(self, packed: Packed) -> Tensor:
        """Returns (T, width) in float32. Goes by some rows: what is added never stands beside the whole matrix."""
        tokens = torch.empty(len(packed.ids), self.words.shape[1])
        matrices = (tokens, packed.ids, self.position_ids(packed))
        for rows, ids, places in zip(*(torch.split(each, NORMED_AT_ONCE) for each in matrices), strict=True):
            rows.copy_(functional.embedding(ids, self.words))
            if self.kind is not None:
                rows.add_(self.kind)
            rows.add_(functional.embedding(places, self.positions))
        return self.norm(tokens)

    def position_ids(self, packed: Packed) -> Tensor:
        """Numbers the tokens as transformers does: a padding token, which a text may spell out, takes no position."""
        if self.padding is None:
            return torch.cat([torch.arange(length) for length in packed.lengths])
        real = (packed.ids != self.padding).long()
        counted = [part.cumsum(0) for part in packed.split(real)]
        return torch.cat(counted) * real + self.padding


AttentionFn = Callable[[Tensor, Tensor], Tensor]
"""From query, key and value side by side (T, 3 * width) to what each token sees (T, width), which is given."""


class Attention:
    """Each text's tokens look at one another (Vaswani et al. 2017), by attention.c or, without it, by torch."""

    def __init__(self, shape: Shape, weights: Mapping[str, Tensor], space: Workspace) -> None:
        self.shape = shape
        self.space = space
        self.scale = 1 / math.sqrt(shape.head)
        self.by_bucket = weights.get("encoder.relative_attention_bias.weight")
        self.library = kernels.library() if shape.head % LANES == 0 else None
        if self.library is not None:
            self.library.autoembed_attention_scratch.restype = ctypes.c_long

    def of(self, packed: Packed) -> AttentionFn:
        """Returns the attention of these texts, which is the same for all layers but for their weights."""
        biases = self.biases(max(packed.lengths))
        if self.library is None:
            return partial(self.by_torch, packed, biases)
        return partial(self.by_kernel, self.library, packed.bounds, max(packed.lengths), biases)

    def biases(self, longest: int) -> Tensor | None:
        """Returns (heads, 2 * longest - 1), with zeros: MPNet adds to a score by how far key is behind query."""
        if self.by_bucket is None:
            return None
        buckets = relative_buckets(torch.arange(1 - longest, longest), self.shape.buckets)
        return functional.pad(self.by_bucket.float()[buckets].t(), (0, LANES)).contiguous()

    def by_kernel(
        self, library: ctypes.CDLL, bounds: Tensor, longest: int, biases: Tensor | None, joined: Tensor, out: Tensor
    ) -> Tensor:
        """Computes in float32, whatever the products' type."""
        threads = torch.get_num_threads()
        longs = [ctypes.c_long(each) for each in (len(bounds) - 1, longest, self.shape.heads, self.shape.head)]
        scratch = self.space.take("scratch", threads, library.autoembed_attention_scratch(longs[1], longs[3]), FLOAT)
        wide = (
            joined
            if joined.dtype == FLOAT
            else self.space.take("wide", len(joined), joined.shape[1], FLOAT).copy_(joined)
        )
        seen = out if out.dtype == FLOAT else self.space.take("seen", len(out), out.shape[1], FLOAT)
        what = pointers(wide, seen, bounds, biases, scratch)
        if library.autoembed_attention(what, *longs, ctypes.c_float(self.scale), ctypes.c_int(threads)) < 0:
            raise RuntimeError("attention does not take heads of this size")
        return out if seen is out else out.copy_(seen)

    def by_torch(self, packed: Packed, biases: Tensor | None, joined: Tensor, out: Tensor) -> Tensor:
        heads, head = self.shape.heads, self.shape.head
        for tokens, seen in zip(packed.split(joined), packed.split(out), strict=True):
            query, key, value = tokens.view(1, -1, 3, heads, head).permute(2, 0, 3, 1, 4)
            mask = None if biases is None else square(biases, len(tokens)).to(joined.dtype)
            found = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scale)
            seen.copy_(found.transpose(1, 2).reshape(seen.shape))
        return out


def square(biases: Tensor, length: int) -> Tensor:
    """Returns (heads, length, length) of (heads, distances): a row for each query."""
    middle = (biases.shape[1] - LANES) // 2
    near = biases[:, middle + 1 - length : middle + length]
    return near.unfold(1, length, 1).flip(1)


class Linear:
    """A matrix product, on the weights as their file has them mapped: all processes share the pages.

    Parts that stand side by side are written into one matrix; copying their weights into one would gain next to
    nothing and cost each process a quarter of the model.
    """

    def __init__(self, weights: Mapping[str, Tensor], names: Sequence[str], dtype: torch.dtype) -> None:
        self.parts = [(weights[f"{name}.weight"].to(dtype).t(), weights[f"{name}.bias"].to(dtype)) for name in names]
        self.outputs = sum(len(bias) for _, bias in self.parts)

    def __call__(self, tokens: Tensor, out: Tensor) -> Tensor:
        """Returns (T, outputs) of (T, inputs)."""
        place = 0
        for weight, bias in self.parts:
            torch.addmm(bias, tokens, weight, out=out[:, place : place + len(bias)])
            place += len(bias)
        return out

    def add_to(self, tokens: Tensor, residual: Tensor) -> Tensor:
        """Adds the same to residual (T, outputs), in place."""
        ((weight, bias),) = self.parts
        residual += bias
        return residual.addmm_(tokens, weight)


class Layer:
    def __init__(self, shape: Shape, weights: Mapping[str, Tensor], number: int, dtype: torch.dtype) -> None:
        names = shape.names(number)
        self.joined, self.output, self.up, self.down = (Linear(weights, each, dtype) for each in names.products)
        self.attention_norm = Norm(weights, names.attention_norm, shape.epsilon, dtype)
        self.norm = Norm(weights, names.norm, shape.epsilon, dtype)
        self.activate = ACTIVATIONS[shape.activation]

    def __call__(self, tokens: Tensor, attend: AttentionFn, space: Workspace) -> Tensor:
        count = len(tokens)
        joined, seen = space.split("products", count, self.joined.outputs, self.output.outputs)
        seen = attend(self.joined(tokens, joined), seen)
        tokens = self.attention_norm(self.output.add_to(seen, tokens))
        inner = self.activate(self.up(tokens, space.take("products", count, self.up.outputs)))
        return self.norm(self.down.add_to(inner, tokens))


class Network:
    """Token ids of packed texts to a vector per token, all in one type of floating point number."""

    def __init__(self, shape: Shape, weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
        self.shape = shape
        self.embeddings = Embeddings(shape, weights)
        self.dtype = dtype
        self.space = Workspace(dtype)
        self.attention = Attention(shape, weights, self.space)
        self.make_layers(weights)

    def make_layers(self, weights: Mapping[str, Tensor]) -> None:
        self.layers = [Layer(self.shape, weights, number, self.dtype) for number in range(self.shape.layers)]

    def __call__(self, packed: Packed, checkpoint: Callable[[], None]) -> Tensor:
        attend = self.attention.of(packed)
        tokens = self.embeddings(packed).to(self.dtype)
        for layer in self.layers:
            checkpoint()
            tokens = layer(tokens, attend, self.space)
        return tokens.float()


def relative_buckets(distances: Tensor, buckets: int, farthest: int = 128) -> Tensor:
    """Returns T5's and MPNet's: one for each near token, then wider and wider, to `farthest` (Raffel et al. 2019)."""
    half = buckets // 2
    behind = (distances > 0).long() * half
    distance = distances.abs()
    exact = half // 2
    spread = torch.log(distance.float() / exact) / math.log(farthest / exact) * (half - exact)
    far = (exact + spread.long().clamp(min=0)).clamp(max=half - 1)
    return behind + torch.where(distance < exact, distance, far)


OLD_NAMES = {"weight": "gamma", "bias": "beta"}


def weight_of(weights: Mapping[str, Tensor], norm: str, part: str) -> Tensor:
    """Finds a norm's weight or bias, which old BERTs call gamma and beta."""
    name = f"{norm}.{part}"
    return weights[name] if name in weights else weights[f"{norm}.{OLD_NAMES[part]}"]
