"""BERT's family of encoders on packed tokens: all texts' tokens in one matrix, none of them padding.

Matrix products see every token of a micro-batch at once; only attention goes text by text. The architectures differ
in their weights' names, in their positions, and in MPNet's bias by relative position:
BERT (Devlin et al. 2018), RoBERTa (Liu et al. 2019), XLM-RoBERTa (Conneau et al. 2019), MPNet (Song et al. 2020).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, groupby
from typing import Any, Protocol

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
# never makes. In between a plain product per head is twice as quick on a CPU.
SHORT, LONG = 48, 300


class UnsupportedNetwork(Exception):
    """What this module cannot compute; sentence-transformers serves such a model. The message says why."""


class Linear(Protocol):
    """weight and bias of one matrix product, in whatever precision."""

    outputs: int

    def __call__(self, tokens: Tensor, out: Tensor) -> Tensor:
        """tokens (T, inputs) to out (T, outputs), which is float32 and is returned."""

    def add_to(self, tokens: Tensor, residual: Tensor) -> Tensor:
        """The same, added to residual (T, outputs) in place."""


MakeLinear = Callable[[Sequence[str]], Linear]
"""From the names of weights that stand side by side: the query's, the key's and the value's are one product."""


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

    def linear_names(self) -> list[list[str]]:
        """The weights of each matrix product, in the order of use."""
        names = NAMES[self.architecture]
        found = []
        for number in range(self.layers):
            prefix = f"encoder.layer.{number}."
            found.append([prefix + part for part in (names.query, names.key, names.value)])
            found += [[prefix + part] for part in (names.output, "intermediate.dense", "output.dense")]
        return found


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

    def __init__(self, weights: Mapping[str, Tensor], name: str, epsilon: float) -> None:
        self.weight = _either(weights, f"{name}.weight", f"{name}.gamma")
        self.bias = _either(weights, f"{name}.bias", f"{name}.beta")
        self.epsilon = epsilon

    def __call__(self, tokens: Tensor) -> Tensor:
        return functional.layer_norm(tokens, self.weight.shape, self.weight, self.bias, self.epsilon)


class Workspace:
    """The big matrices between layers, kept: new ones for each product would cost a page fault per 4 kB."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def take(self, name: str, rows: int, columns: int) -> Tensor:
        kept = self._kept.get(name)
        if kept is None or kept.numel() < rows * columns:
            self._kept.pop(name, None)
            kept = self._kept[name] = torch.empty(rows * columns)
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


class Attention:
    """Each text's tokens look at one another (Vaswani et al. 2017), by flash attention or a product per head."""

    def __init__(self, shape: Shape, weights: Mapping[str, Tensor]) -> None:
        self.shape = shape
        self.scale = 1 / math.sqrt(shape.head)
        self.by_bucket = weights.get("encoder.relative_attention_bias.weight")

    def biases(self, packed: Packed) -> list[Tensor | None]:
        """(heads, length, length) a group: MPNet adds to each score by how far apart two tokens are."""
        if self.by_bucket is None:
            return [None] * len(packed.groups)
        longest = max(packed.lengths)
        places = torch.arange(longest)
        buckets = relative_buckets(places[None, :] - places[:, None], self.shape.buckets)
        whole = self.by_bucket[buckets].permute(2, 0, 1).contiguous()
        return [whole[:, : group.length, : group.length].contiguous() for group in packed.groups]

    def __call__(self, joined: Tensor, packed: Packed, biases: Sequence[Tensor | None], out: Tensor) -> Tensor:
        """joined (T, 3 * width) to out (T, width)."""
        heads, head = self.shape.heads, self.shape.head
        for group, bias in zip(packed.groups, biases, strict=True):
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


class Layer:
    def __init__(self, shape: Shape, weights: Mapping[str, Tensor], number: int, linears: Sequence[Linear]) -> None:
        prefix = f"encoder.layer.{number}."
        self.joined, self.output, self.up, self.down = linears
        self.attention_norm = Norm(weights, prefix + NAMES[shape.architecture].attention_norm, shape.epsilon)
        self.norm = Norm(weights, f"{prefix}output.LayerNorm", shape.epsilon)
        self.activate = ACTIVATIONS[shape.activation]

    def __call__(
        self, tokens: Tensor, packed: Packed, attention: Attention, biases: Sequence[Tensor | None], space: Workspace
    ) -> Tensor:
        count = len(tokens)
        joined = self.joined(tokens, space.take("joined", count, self.joined.outputs))
        seen = attention(joined, packed, biases, space.take("seen", count, self.output.outputs))
        tokens = self.attention_norm(self.output.add_to(seen, tokens))
        inner = self.activate(self.up(tokens, space.take("inner", count, self.up.outputs)))
        return self.norm(self.down.add_to(inner, tokens))


class Network:
    """Token ids of packed texts to a vector per token. Floating point is float32 but inside of a Linear."""

    def __init__(self, shape: Shape, weights: Mapping[str, Tensor], make_linear: MakeLinear) -> None:
        linears = [make_linear(names) for names in shape.linear_names()]
        self.shape = shape
        self.embeddings = Embeddings(shape, weights)
        self.attention = Attention(shape, weights)
        self.layers = [
            Layer(shape, weights, number, linears[4 * number : 4 * number + 4]) for number in range(shape.layers)
        ]
        self.space = Workspace()

    def __call__(self, packed: Packed, checkpoint: Callable[[], None]) -> Tensor:
        biases = self.attention.biases(packed)
        tokens = self.embeddings(packed)
        for layer in self.layers:
            checkpoint()
            tokens = layer(tokens, packed, self.attention, biases, self.space)
        return tokens


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
    return (weights[name] if name in weights else weights[former]).float()
