"""Matrix products in int8 (opt-in): each weight's column and each token's row as bytes with a scale.

Weights are symmetric, one scale an output; rows have a scale and a middle of their own, so that a text's vector does
not depend on the texts beside it. The few inputs of each product that are far larger than all others stay float32, as
in LLM.int8 (Dettmers et al. 2022); which ones is seen once, when the model is added. Products are exact in 32 bits.
What lies between them is int8.c; attention, norms and pooling stay float32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from autoembed.encoding.packed import kernels
from autoembed.encoding.packed.kernels import pointer, pointers
from autoembed.encoding.packed.network import (
    AttentionFn,
    LayerNames,
    Linear,
    Network,
    Norm,
    Packed,
    Shape,
    UnsupportedNetwork,
    Workspace,
)

STEPS = 127
# As int8.c has them.
OUTLIERS = 8
LARGEST_ROW = 16_384


class Rows(NamedTuple):
    """A matrix (T, width) as bytes; x = steps * scale + middle, row by row."""

    steps: Tensor
    scales: Tensor
    middles: Tensor
    outliers: Tensor


class Weight(NamedTuple):
    """outputs x inputs as bytes; `sums` is each output's sum of weights.

    `outliers` (OUTLIERS x outputs) are the weights of the inputs at `places`.
    """

    steps: Tensor
    scales: Tensor
    sums: Tensor
    bias: Tensor
    outliers: Tensor
    places: Tensor

    @property
    def outputs(self) -> int:
        return len(self.bias)


def quantize(network: Network, weights: Mapping[str, Tensor], texts: Packed) -> dict[str, Tensor]:
    """Returns what `model add` writes in place of the weights: all matrix products in bytes, anything else as it is.

    Raises UnsupportedNetwork where that is not computed.
    """
    check(network.shape)
    kept = dict(weights)
    for number, largest in enumerate(watch(network, texts)):
        for names, inputs in zip(network.shape.names(number).products, largest, strict=True):
            weight = torch.cat([kept.pop(f"{name}.weight").float() for name in names])
            bias = torch.cat([kept.pop(f"{name}.bias").float() for name in names])
            for part, tensor in zip(Weight._fields, quantized(weight, bias, inputs), strict=True):
                kept[f"{names[0]}.{part}"] = tensor.contiguous()
    return {name: tensor.float() if tensor.dtype.is_floating_point else tensor for name, tensor in kept.items()}


def quantized(weight: Tensor, bias: Tensor, largest: Tensor) -> Weight:
    """Returns a weight in bytes; `largest` is what each input has been seen to be at most."""
    places = largest.topk(OUTLIERS).indices.sort().values
    outliers = weight[:, places].t().contiguous()
    rest = weight.index_fill(1, places, 0.0)
    scales = rest.abs().amax(1).clamp(min=1e-30) / STEPS
    steps = (rest / scales[:, None]).round().to(torch.int8)
    return Weight(steps, scales, steps.sum(1, dtype=torch.int32).float() * scales, bias, outliers, places)


def check(shape: Shape) -> None:
    if shape.activation != "gelu":
        raise UnsupportedNetwork(f"int8 needs the activation gelu, not {shape.activation}")
    if not OUTLIERS <= min(shape.width, shape.inner) <= max(3 * shape.width, shape.inner) <= LARGEST_ROW:
        raise UnsupportedNetwork(f"int8 needs products from {OUTLIERS} to {LARGEST_ROW} wide")


def check_weight(weight: Weight, inputs: int) -> None:
    """Checks what int8.c takes for granted: it would write wherever `places` say."""
    outputs = weight.outputs
    expected = ((outputs, inputs), (outputs,), (outputs,), (outputs,), (OUTLIERS, outputs), (OUTLIERS,))
    types = (torch.int8, *[torch.float32] * 4, torch.int64)
    for tensor, shape, dtype in zip(weight, expected, types, strict=True):
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError("the int8 weights are not of the shapes that the model's configuration says")
    if not bool(((weight.places >= 0) & (weight.places < inputs)).all()):
        raise ValueError("the int8 weights name inputs that there are not")


class Watched:
    """A matrix product that remembers the largest of each input."""

    def __init__(self, linear: Linear) -> None:
        self.linear = linear
        self.outputs = linear.outputs
        self.largest = torch.zeros(())

    def __call__(self, tokens: Tensor, out: Tensor) -> Tensor:
        self.largest = tokens.abs().amax(0)
        return self.linear(tokens, out)

    def add_to(self, tokens: Tensor, residual: Tensor) -> Tensor:
        self.largest = tokens.abs().amax(0)
        return self.linear.add_to(tokens, residual)


def watch(network: Network, texts: Packed) -> list[list[Tensor]]:
    """Returns the largest of each input of each layer's products. The network is good for nothing else afterwards."""
    products = []
    for layer in network.layers:
        watched = [Watched(linear) for linear in (layer.joined, layer.output, layer.up, layer.down)]
        layer.joined, layer.output, layer.up, layer.down = watched  # type: ignore[assignment]
        products.append(watched)
    with torch.inference_mode():
        network(texts, lambda: None)
    return [[watched.largest for watched in layer] for layer in products]


class QuantizedLayer:
    def __init__(self, kernels: Kernels, shape: Shape, weights: Mapping[str, Tensor], names: LayerNames) -> None:
        self.kernels = kernels
        self.joined, self.output, self.up, self.down = (
            Weight(*(weights[f"{name[0]}.{part}"] for part in Weight._fields)) for name in names.products
        )
        for weight, inputs in zip(
            (self.joined, self.output, self.up, self.down),
            (shape.width, shape.width, shape.width, shape.inner),
            strict=True,
        ):
            check_weight(weight, inputs)
        self.attention_norm = Norm(weights, names.attention_norm, shape.epsilon)
        self.norm = Norm(weights, names.norm, shape.epsilon)

    def __call__(self, tokens: Tensor, rows: Rows, attend: AttentionFn, after: Weight, space: Workspace) -> Rows:
        """Changes tokens (T, width) in place; rows are the same as bytes, made for the product that comes after."""
        kernels = self.kernels
        joined, seen = kernels.product(rows, self.joined, self.output.outputs, space)
        rows = kernels.quantize(attend(joined, seen), self.output, space)
        rows = kernels.add_norm(rows, self.output, tokens, self.attention_norm, self.up, space)
        rows = kernels.gelu(rows, self.up, self.down, space)
        return kernels.add_norm(rows, self.down, tokens, self.norm, after, space)


class QuantizedNetwork(Network):
    def __init__(self, shape: Shape, weights: Mapping[str, Tensor]) -> None:
        check(shape)
        self.kernels = Kernels()
        super().__init__(shape, weights)

    def make_layers(self, weights: Mapping[str, Tensor]) -> None:
        names = map(self.shape.names, range(self.shape.layers))
        self.quantized = [QuantizedLayer(self.kernels, self.shape, weights, each) for each in names]

    def __call__(self, packed: Packed, checkpoint: Callable[[], None]) -> Tensor:
        attend = self.attention.of(packed)
        tokens = self.embeddings(packed)
        rows = self.kernels.quantize(tokens, self.quantized[0].joined, self.space)
        following = [*self.quantized[1:], self.quantized[-1]]  # what the last one makes for a product, none takes
        for layer, after in zip(self.quantized, following, strict=True):
            checkpoint()
            rows = layer(tokens, rows, attend, after.joined, self.space)
        return tokens


class Kernels:
    """The functions of int8.c, which this class calls."""

    def __init__(self) -> None:
        library = kernels.library()
        if library is None:
            raise UnsupportedNetwork("this installation was built without a C compiler, and so without int8")
        self.library = library

    def product(self, rows: Rows, weight: Weight, beside: int, space: Workspace) -> tuple[Tensor, Tensor]:
        """Returns floats in the place of the sums that they are made of, with room for (T, beside) others next to them.

        Both are good until the next product.
        """
        sums, room = self._sums(rows, weight, space, beside)
        self._call("dequantize", self._product(sums, rows, weight), *sizes(sums), pointer(sums))
        return sums.view(torch.float32), room.view(torch.float32)

    def quantize(self, values: Tensor, after: Weight, space: Workspace) -> Rows:
        """Quantizes a matrix for the product that comes after; the others below do the same with their own results."""
        rows = self._rows("narrow", values, space)
        self._call("quantize", pointer(values), *sizes(values), pointers(*rows, after.places))
        return rows

    def gelu(self, rows: Rows, weight: Weight, after: Weight, space: Workspace) -> Rows:
        sums, _ = self._sums(rows, weight, space)
        wide = self._rows("wide", sums, space)
        self._call("gelu", self._product(sums, rows, weight), *sizes(sums), pointers(*wide, after.places))
        return wide

    def add_norm(self, rows: Rows, weight: Weight, tokens: Tensor, norm: Norm, after: Weight, space: Workspace) -> Rows:
        sums, _ = self._sums(rows, weight, space)
        normed = self._rows("normed", tokens, space)
        learned = (pointer(norm.weight), pointer(norm.bias), ctypes.c_float(norm.epsilon))
        out = pointers(*normed, after.places)
        self._call("add_norm", self._product(sums, rows, weight), *sizes(sums), *learned, pointer(tokens), out)
        return normed

    def _sums(self, rows: Rows, weight: Weight, space: Workspace, beside: int = 0) -> list[Tensor]:
        """Returns the sums, in the place of the last product's, with room for (T, beside)."""
        sums, room = space.split("sums", len(rows.steps), weight.outputs, beside, dtype=torch.int32)
        torch._int_mm(rows.steps, weight.steps.t(), out=sums)
        return [sums, room]

    def _product(self, sums: Tensor, rows: Rows, weight: Weight) -> ctypes.Array[ctypes.c_void_p]:
        return pointers(sums, *rows[1:], *weight[1:5])

    def _rows(self, name: str, like: Tensor, space: Workspace) -> Rows:
        steps = space.take(name, like.shape[0], like.shape[1], torch.int8)
        scales, middles = space.take(f"{name} scales", 2, len(like)).unbind(0)
        return Rows(steps, scales, middles, space.take(f"{name} outliers", len(like), OUTLIERS))

    def _call(self, name: str, *arguments: object) -> None:
        threads = ctypes.c_int(torch.get_num_threads())
        if getattr(self.library, f"autoembed_{name}")(*arguments, threads) < 0:
            raise RuntimeError(f"int8 {name} does not take rows of this length")


def sizes(matrix: Tensor) -> tuple[ctypes.c_long, ...]:
    return tuple(map(ctypes.c_long, matrix.shape))
