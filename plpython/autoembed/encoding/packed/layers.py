"""The network of network.py with its layers in C: layers.c, which computes in float32, bfloat16 and int8.

Its weights stay as their file has them mapped, and so all processes share them. float32's are as they are published;
those of the other precisions are packed in panels when the model is added: PANEL outputs side by side, and of each as
many inputs as 32 bits hold, as the processor multiplies them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from autoembed.encoding.packed import kernels
from autoembed.encoding.packed.network import (
    OFFSET,
    LayerNames,
    Packed,
    Shape,
    UnsupportedNetwork,
    Workspace,
    relative_buckets,
    weight_of,
)

# As layers.c has them.
PANEL, UNIT, OUTLIERS = 32, 16, 8
TYPES = {"float32": 0, "bfloat16": 1, "int8": 2}
ACTIVATIONS = {"gelu": 1, "gelu_new": 2, "gelu_pytorch_tanh": 2, "relu": 3}
STAGES = (
    "embeddings", "attention's product", "attention", "output", "up", "down", "norms", "narrowing", "waiting",
)  # fmt: skip
HALVES, BYTES = torch.bfloat16, torch.int8
LEAST_REACH = 64
SLICE_FLOP = 4e9
"""Layers that together are less than this are one call: a cancel is seen between calls."""


class ProductStruct(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weights", "bias", "scales", "sums", "outlier_weights", "places")),
        ("inputs", ctypes.c_long),
        ("outputs", ctypes.c_long),
    ]


class NormStruct(ctypes.Structure):
    _fields_ = [("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p)]


class LayerStruct(ctypes.Structure):
    _fields_ = [
        ("joined", ProductStruct * 3),
        ("parts", ctypes.c_long),
        *((name, ProductStruct) for name in ("output", "up", "down")),
        ("attention_norm", NormStruct),
        ("norm", NormStruct),
    ]


class EmbeddingsStruct(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("words", "positions", "kind")),
        ("norm", NormStruct),
        *((name, ctypes.c_long) for name in ("halves", "vocabulary", "farthest", "padding")),
    ]


class NetworkStruct(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_long) for name in ("type", "width", "inner", "heads", "activation")),
        ("epsilon", ctypes.c_double),
        ("embeddings", EmbeddingsStruct),
        ("layers", ctypes.c_void_p),
    ]


class BatchStruct(ctypes.Structure):
    _fields_ = [
        ("ids", ctypes.c_void_p),
        ("tokens", ctypes.c_void_p),
        ("rows", ctypes.c_long),
        ("starts", ctypes.c_void_p),
        ("texts", ctypes.c_long),
        ("longest", ctypes.c_long),
        ("biases", ctypes.c_void_p),
        ("reach", ctypes.c_long),
        ("space", ctypes.c_void_p),
        ("seconds", ctypes.c_void_p),
    ]


def serves(shape: Shape) -> str:
    """Returns why layers.c does not compute this network; '' where it does."""
    if kernels.library() is None:
        return "this installation was built without a C compiler"
    if shape.activation not in ACTIVATIONS:
        return f"the activation {shape.activation} is not among {', '.join(ACTIVATIONS)}"
    if shape.width % shape.heads or min(shape.width, shape.inner) < OUTLIERS:
        return "its heads do not share its width evenly"
    return ""


def panels(weight: Tensor) -> Tensor:
    """Returns outputs x inputs of bfloat16 or int8 as layers.c takes them, zeros where there are none."""
    per_word = 4 // weight.element_size()
    outputs, inputs = weight.shape
    unit = UNIT * per_word
    whole = weight.new_zeros(-(-outputs // PANEL) * PANEL, -(-inputs // unit) * unit)
    whole[:outputs, :inputs] = weight
    return whole.view(-1, PANEL, whole.shape[1] // per_word, per_word).transpose(1, 2).contiguous()


def halved(weights: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Returns a product in bfloat16, of those that stand side by side."""
    weight = torch.cat([weights[f"{name}.weight"] for name in names])
    bias = torch.cat([weights[f"{name}.bias"] for name in names])
    return {f"{names[0]}.panels": panels(weight.to(HALVES)), f"{names[0]}.bias": bias.float()}


class Builder:
    """Makes C's structs of tensors. It checks their shapes, which C takes for granted, and keeps them alive."""

    def __init__(self, weights: Mapping[str, Tensor], precision: str) -> None:
        self.weights = weights
        self.precision = precision
        self.kept: list[Any] = []

    def pointer(self, tensor: Tensor, dtype: torch.dtype, *sizes: int) -> int:
        if tuple(tensor.shape) != sizes:
            raise ValueError("the weights are not of the shapes that the model's configuration says")
        kept = tensor.to(dtype).contiguous()
        self.kept.append(kept)
        return kept.data_ptr()

    def floats(self, name: str, *sizes: int) -> int:
        return self.pointer(self.weights[name], torch.float32, *sizes)

    def product(self, name: str, inputs: int, outputs: int) -> ProductStruct:
        found = ProductStruct(bias=self.floats(f"{name}.bias", outputs), inputs=inputs, outputs=outputs)
        if self.precision == "float32":
            found.weights = self.floats(f"{name}.weight", outputs, inputs)
            return found
        packed = self.weights[f"{name}.panels"]
        dtype = HALVES if self.precision == "bfloat16" else BYTES
        if packed.dtype != dtype:
            raise ValueError("the weights are not of the type that the model's precision says")
        per_word = 4 // packed.element_size()
        units = -(-inputs // (UNIT * per_word))
        found.weights = self.pointer(packed, dtype, -(-outputs // PANEL), units * UNIT, PANEL, per_word)
        if dtype == BYTES:
            found.scales, found.sums = (self.floats(f"{name}.{part}", outputs) for part in ("scales", "sums"))
            found.outlier_weights = self.floats(f"{name}.outliers", OUTLIERS, outputs)
            found.places = self.places(self.weights[f"{name}.places"], inputs)
        return found

    def places(self, places: Tensor, inputs: int) -> int:
        """Returns where they are; C would write wherever they say."""
        if not bool(((places >= 0) & (places < inputs)).all()):
            raise ValueError("the int8 weights name inputs that there are not")
        return self.pointer(places, torch.int64, OUTLIERS)

    def norm(self, name: str, width: int) -> NormStruct:
        weight, bias = (weight_of(self.weights, name, part) for part in ("weight", "bias"))
        return NormStruct(*(self.pointer(each, torch.float32, width) for each in (weight, bias)))

    def layer(self, names: LayerNames, shape: Shape) -> LayerStruct:
        width, inner = shape.width, shape.inner
        separate = self.precision == "float32"
        joined = names.joined if separate else names.joined[:1]
        products = (self.product(name, width, width if separate else 3 * width) for name in joined)
        return LayerStruct(
            joined=(ProductStruct * 3)(*products),
            parts=len(joined),
            output=self.product(names.output, width, width),
            up=self.product(names.up, width, inner),
            down=self.product(names.down, inner, width),
            attention_norm=self.norm(names.attention_norm, width),
            norm=self.norm(names.norm, width),
        )

    def embeddings(self, shape: Shape) -> EmbeddingsStruct:
        words, positions = (self.weights[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position"))
        dtype = HALVES if words.dtype == positions.dtype == HALVES else torch.float32
        kinds = self.weights.get("embeddings.token_type_embeddings.weight")
        return EmbeddingsStruct(
            words=self.pointer(words, dtype, len(words), shape.width),
            positions=self.pointer(positions, dtype, len(positions), shape.width),
            kind=None if kinds is None else self.pointer(kinds[0], torch.float32, shape.width),
            norm=self.norm("embeddings.LayerNorm", shape.width),
            halves=dtype == HALVES,
            vocabulary=len(words),
            farthest=len(positions),
            padding=shape.padding if shape.architecture in OFFSET else -1,
        )


class LayeredNetwork:
    """Token ids of packed texts to a vector per token, by layers.c."""

    def __init__(self, shape: Shape, weights: Mapping[str, Tensor], precision: str) -> None:
        if reason := serves(shape):
            raise UnsupportedNetwork(reason)
        self.shape = shape
        self.space = Workspace(torch.uint8)
        self.library = kernels.layers()
        build = Builder(weights, precision)
        self.layers = (LayerStruct * shape.layers)(
            *(build.layer(shape.names(each), shape) for each in range(shape.layers))
        )
        self.network = NetworkStruct(
            type=TYPES[precision],
            width=shape.width,
            inner=shape.inner,
            heads=shape.heads,
            activation=ACTIVATIONS[shape.activation],
            epsilon=shape.epsilon,
            embeddings=build.embeddings(shape),
            layers=ctypes.addressof(self.layers),
        )
        self.tensors = build.kept
        self.by_bucket = weights.get("encoder.relative_attention_bias.weight")
        self.biases: Tensor | None = None
        self.reach = 0

    def __call__(self, packed: Packed, checkpoint: Callable[[], None], seconds: Any = None) -> Tensor:
        """Returns (T, width); `seconds`, an array of STAGES, gets what each took in the first thread."""
        rows, longest = len(packed.ids), max(packed.lengths)
        threads = torch.get_num_threads()
        tokens = torch.empty(rows, self.shape.width)
        starts = packed.bounds
        self.reach_to(longest)
        size = self.library.autoembed_layers_space(ctypes.byref(self.network), rows, longest, threads)
        batch = BatchStruct(
            ids=packed.ids.data_ptr(),
            tokens=tokens.data_ptr(),
            rows=rows,
            starts=starts.data_ptr(),
            texts=len(packed.lengths),
            longest=longest,
            biases=None if self.biases is None else self.biases.data_ptr(),
            reach=self.reach,
            space=self.space.take("space", 1, size).data_ptr(),
            seconds=None if seconds is None else ctypes.addressof(seconds),
        )
        at_once = self.layers_at_once(rows)
        for first in range(0, self.shape.layers, at_once):
            checkpoint()
            last = min(first + at_once, self.shape.layers)
            if self.library.autoembed_layers(ctypes.byref(self.network), ctypes.byref(batch), first, last, threads):
                raise IndexError("a token or a position is beyond the embeddings")
        return tokens

    def layers_at_once(self, rows: int) -> int:
        flop = 2.0 * rows * (4 * self.shape.width**2 + 2 * self.shape.width * self.shape.inner)
        return max(1, int(SLICE_FLOP / flop))

    def reach_to(self, longest: int) -> None:
        """Has the biases ready for texts of this length: MPNet adds to a score by how far key is behind query."""
        if self.by_bucket is None or longest <= self.reach:
            return
        self.reach = max(LEAST_REACH, 2 ** (longest - 1).bit_length())
        buckets = relative_buckets(torch.arange(1 - self.reach, self.reach), self.shape.buckets)
        self.biases = functional.pad(self.by_bucket.float()[buckets].t(), (0, PANEL)).contiguous()
