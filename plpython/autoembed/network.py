"""BERT's family of encoders on packed tokens: all texts' tokens in one matrix, none of them padding.

Matrix products see every token of a micro-batch at once; only attention goes text by text. The architectures differ
in their weights' names, in their positions, and in MPNet's bias by relative position:
BERT (Devlin et al. 2018), RoBERTa (Liu et al. 2019), XLM-RoBERTa (Conneau et al. 2019), MPNet (Song et al. 2020).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain, groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": torch.ops.aten.gelu_,
    "gelu_new": lambda values: torch.ops.aten.gelu_(values, approximate="tanh"),
    "gelu_pytorch_tanh": lambda values: torch.ops.aten.gelu_(values, approximate="tanh"),
    "relu": torch.relu_,
}
# Flash attention is quicker for short texts, many of a length at once, and for long ones, whose matrix of scores it
# never makes. In between a plain product per head is twice as quick on a CPU. Without MKL torch makes the products one
# by one, and only the small ones are worth it.
SHORT, LONG = 48, 300 if torch._C.has_mkl else 128


class UnsupportedNetwork(Exception):
    """What this module cannot compute; sentence-transformers serves such a model. The message says why."""


@dataclass(frozen=True)
class Names:
    """Where an architecture keeps its weights, below `encoder.layer.N.`"""

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


NAMES = {"bert": BERT_NAMES, "roberta": BERT_NAMES, "xlm-roberta": BERT_NAMES, "mpnet": MPNET_NAMES}
OFFSET = ("roberta", "xlm-roberta", "mpnet")  # position ids begin after the padding token's id


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
    def read(cls, config: Mapping[str, Any]) -> Shape:
        """Refuses what the product has not got; a key that is missing has the architecture's default."""
        architecture = str(config["model_type"])
        if architecture not in NAMES:
            raise UnsupportedNetwork(f"the architecture {architecture} is not among {', '.join(NAMES)}")
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
        """Of the weights of one layer."""
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
class Group:
    """Texts of one length that attention takes together."""

    start: int
    count: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.count * self.length


@dataclass(frozen=True)
class Packed:
    """Texts as one row of token ids (T), and where each begins and ends."""

    ids: Tensor
    lengths: list[int]
    groups: list[Group]

    @classmethod
    def of(cls, texts: Sequence[Sequence[int]]) -> Packed:
        """In the order given; equal lengths stand side by side where the texts are sorted by length."""
        lengths = [len(text) for text in texts]
        return cls(torch.tensor(list(chain.from_iterable(texts))), lengths, list(_groups(lengths)))

    @property
    def starts(self) -> list[int]:
        return [0, *accumulate(self.lengths)][:-1]

    def split(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Rows of a matrix (T, …), text by text."""
        return torch.split_with_sizes(tokens, self.lengths)


def _groups(lengths: Sequence[int]) -> Iterator[Group]:
    start = 0
    for length, run in groupby(lengths):
        count = len(list(run))
        together = count if length <= SHORT else 1
        for _ in range(count // together):
            yield Group(start, together, length)
            start += together * length


class Norm:
    """Layer normalization over the width (Ba et al. 2016)."""

    def __init__(
        self, weights: Mapping[str, Tensor], name: str, epsilon: float, dtype: torch.dtype = torch.float32
    ) -> None:
        self.weight = _either(weights, f"{name}.weight", f"{name}.gamma").to(dtype)
        self.bias = _either(weights, f"{name}.bias", f"{name}.beta").to(dtype)
        self.epsilon = epsilon

    def __call__(self, tokens: Tensor) -> Tensor:
        return functional.layer_norm(tokens, self.weight.shape, self.weight, self.bias, self.epsilon)


class Workspace:
    """The big matrices between layers, kept: new ones for each product would cost a page fault per 4 kB."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._kept: dict[str, Tensor] = {}

    def take(self, name: str, rows: int, columns: int, dtype: torch.dtype | None = None) -> Tensor:
        kept = self._kept.get(name)
        if kept is None or kept.numel() < rows * columns:
            self._kept.pop(name, None)
            kept = self._kept[name] = torch.empty(rows * columns, dtype=dtype or self.dtype)
        return kept[: rows * columns].view(rows, columns)

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
        tokens = functional.embedding(packed.ids, self.words).float()
        if self.kind is not None:
            tokens += self.kind
        tokens += functional.embedding(self.position_ids(packed), self.positions)
        return self.norm(tokens)

    def position_ids(self, packed: Packed) -> Tensor:
        """As in transformers: a padding token inside a text, which its text may spell out, takes no position."""
        if self.padding is None:
            return torch.cat([torch.arange(length) for length in packed.lengths])
        real = (packed.ids != self.padding).long()
        counted = [part.cumsum(0) for part in packed.split(real)]
        return torch.cat(counted) * real + self.padding


Look = Callable[[Tensor, Tensor], Tensor]
"""From query, key and value side by side (T, 3 * width) to what each token sees (T, width), which is given."""


class Attention:
    """Each text's tokens look at one another (Vaswani et al. 2017), by flash attention or a product per head."""

    def __init__(self, shape: Shape, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self.shape = shape
        self.scale = 1 / math.sqrt(shape.head)
        by_bucket = weights.get("encoder.relative_attention_bias.weight")
        self.by_bucket = None if by_bucket is None else by_bucket.to(dtype)

    def of(self, packed: Packed) -> Look:
        """All layers look at the same texts."""
        return partial(self.look, packed.groups, self.biases(packed))

    def biases(self, packed: Packed) -> list[Tensor | None]:
        """(heads, length, length) a group: MPNet adds to each score by how far apart two tokens are."""
        if self.by_bucket is None:
            return [None] * len(packed.groups)
        longest = max(packed.lengths)
        places = torch.arange(longest)
        buckets = relative_buckets(places[None, :] - places[:, None], self.shape.buckets)
        whole = self.by_bucket[buckets].permute(2, 0, 1).contiguous()
        return [whole[:, : group.length, : group.length].contiguous() for group in packed.groups]

    def look(self, groups: Sequence[Group], biases: Sequence[Tensor | None], joined: Tensor, out: Tensor) -> Tensor:
        heads, head = self.shape.heads, self.shape.head
        for group, bias in zip(groups, biases, strict=True):
            parts = joined[group.start : group.end].view(group.count, group.length, 3, heads, head)
            look = self.plain if SHORT < group.length <= LONG else self.flash
            seen = out[group.start : group.end].view(group.count, group.length, heads, head)
            seen.copy_(look(parts.permute(2, 0, 3, 1, 4), bias).transpose(1, 2))
        return out

    def flash(self, parts: Tensor, bias: Tensor | None) -> Tensor:
        """(3, texts, heads, length, head) to (texts, heads, length, head) (Dao et al. 2022)."""
        query, key, value = parts.unbind(0)
        mask = None if bias is None else bias.expand(len(query), -1, -1, -1)
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scale)

    def plain(self, parts: Tensor, bias: Tensor | None) -> Tensor:
        """The same of one text, (3, 1, heads, length, head)."""
        query, key, value = parts[:, 0].unbind(0)
        added = query.new_empty(()) if bias is None else bias
        scores = torch.baddbmm(added, query, key.transpose(1, 2), beta=int(bias is not None), alpha=self.scale)
        return torch.bmm(scores.softmax(-1), value)[None]


class Linear:
    """A matrix product, on the weights as their file has them mapped: all processes share the pages.

    Parts that stand side by side are written into one matrix; copying their weights into one would gain next to
    nothing and cost each process a quarter of the model.
    """

    def __init__(self, weights: Mapping[str, Tensor], names: Sequence[str], dtype: torch.dtype) -> None:
        self.parts = [(weights[f"{name}.weight"].to(dtype).t(), weights[f"{name}.bias"].to(dtype)) for name in names]
        self.outputs = sum(len(bias) for _, bias in self.parts)

    def __call__(self, tokens: Tensor, out: Tensor) -> Tensor:
        """(T, inputs) to (T, outputs)"""
        place = 0
        for weight, bias in self.parts:
            torch.addmm(bias, tokens, weight, out=out[:, place : place + len(bias)])
            place += len(bias)
        return out

    def add_to(self, tokens: Tensor, residual: Tensor) -> Tensor:
        """The same, added to residual (T, outputs) in place."""
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

    def __call__(self, tokens: Tensor, looks: Look, space: Workspace) -> Tensor:
        count = len(tokens)
        joined = self.joined(tokens, space.take("joined", count, self.joined.outputs))
        seen = looks(joined, space.take("seen", count, self.output.outputs))
        tokens = self.attention_norm(self.output.add_to(seen, tokens))
        inner = self.activate(self.up(tokens, space.take("inner", count, self.up.outputs)))
        return self.norm(self.down.add_to(inner, tokens))


class Network:
    """Token ids of packed texts to a vector per token, all in one type of floating point number."""

    def __init__(self, shape: Shape, weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
        self.shape = shape
        self.embeddings = Embeddings(shape, weights)
        self.attention = Attention(shape, weights, dtype)
        self.dtype = dtype
        self.space = Workspace(dtype)
        self.make_layers(weights)

    def make_layers(self, weights: Mapping[str, Tensor]) -> None:
        self.layers = [Layer(self.shape, weights, number, self.dtype) for number in range(self.shape.layers)]

    def __call__(self, packed: Packed, checkpoint: Callable[[], None]) -> Tensor:
        looks = self.attention.of(packed)
        tokens = self.embeddings(packed).to(self.dtype)
        for layer in self.layers:
            checkpoint()
            tokens = layer(tokens, looks, self.space)
        return tokens.float()


def relative_buckets(distances: Tensor, buckets: int, farthest: int = 128) -> Tensor:
    """T5's and MPNet's: one each for near tokens, logarithmically wider ones up to `farthest` (Raffel et al. 2019)."""
    half = buckets // 2
    behind = (distances > 0).long() * half
    distance = distances.abs()
    exact = half // 2
    spread = torch.log(distance.float() / exact) / math.log(farthest / exact) * (half - exact)
    far = (exact + spread.long().clamp(min=0)).clamp(max=half - 1)
    return behind + torch.where(distance < exact, distance, far)


def _either(weights: Mapping[str, Tensor], name: str, former: str) -> Tensor:
    """Old BERTs call a norm's weight gamma and its bias beta."""
    return weights[name] if name in weights else weights[former]
