"""layers.c against torch, in each of its forms: for this processor, and as if it had less."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from autoembed.encoding.packed import kernels, layers
from autoembed.encoding.packed.encoder import halve
from autoembed.encoding.packed.int8 import quantize, quantized
from autoembed.encoding.packed.layers import TYPES, Builder, LayeredNetwork
from autoembed.encoding.packed.network import Network, Packed, Shape

LEVELS = range(kernels.MOST + 1)  # any, AVX2, AVX-512, its dot products, AMX
ACTIVATIONS: dict[int, Callable[[Tensor], Tensor]] = {
    0: lambda values: values,
    1: functional.gelu,
    2: lambda values: functional.gelu(values, approximate="tanh"),
    3: functional.relu,
}
TOLERANCES = {"float32": 2e-6, "bfloat16": 0.01, "int8": 0.02}
"""Of the sizes of what is summed up, together."""
SMALL: dict[str, Any] = {
    "vocab_size": 50, "max_position_embeddings": 200, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 3, "num_attention_heads": 2, "pad_token_id": 1,
}  # fmt: skip
ODD = {**SMALL, "hidden_size": 39, "intermediate_size": 53, "num_attention_heads": 3}
LENGTHS = [1, 2, 7, 16, 17, 31, 32, 33, 64, 65, 100]


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[int]:
    """What layers.c is told to use at most; a processor that has less repeats nothing."""
    library = kernels.layers()
    try:
        if library.autoembed_processor(request.param) < request.param:
            pytest.skip("this processor has less")
        yield request.param
    finally:
        library.autoembed_processor(kernels.MOST)


@pytest.fixture
def default_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Product:
    """A random product in a precision, with one input far larger than the others."""

    def __init__(self, precision: str, inputs: int, outputs: int) -> None:
        torch.manual_seed(inputs + outputs)
        self.weight, self.bias = torch.randn(outputs, inputs), torch.randn(outputs)
        self.precision, self.inputs, self.outputs = precision, inputs, outputs
        tensors = {"p.weight": self.weight, "p.bias": self.bias}
        if precision == "bfloat16":
            tensors |= layers.halved(tensors, ["p"])
        if precision == "int8":
            largest = torch.ones(inputs)
            largest[3] = 100
            tensors |= {f"p.{part}": tensor for part, tensor in quantized(self.weight, largest).items()}
        self.builder = Builder(tensors, precision)
        self.struct = self.builder.product("p", inputs, outputs)

    def tokens(self, rows: int) -> Tensor:
        torch.manual_seed(rows)
        tokens = torch.randn(rows, self.inputs) + 0.5
        tokens[:, 3] *= 100
        return tokens

    def __call__(self, tokens: Tensor, activation: int = 0, residual: Tensor | None = None, threads: int = 1) -> Tensor:
        library, rows, kind = kernels.layers(), len(tokens), TYPES[self.precision]
        out = torch.full((rows, self.outputs), torch.nan)
        struct = ctypes.byref(self.struct)
        space = torch.empty(library.autoembed_product_space(kind, struct, rows, threads), dtype=torch.uint8)
        added = None if residual is None else residual.data_ptr()
        library.autoembed_product(
            kind, struct, tokens.data_ptr(), rows, activation, added, out.data_ptr(), space.data_ptr(), threads
        )
        return out


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 96), (37, 45), (130, 8)])
def test_a_product_of_any_number_of_rows(level: int, precision: str, inputs: int, outputs: int) -> None:
    product = Product(precision, inputs, outputs)
    for rows in (*range(1, 41), 64, 65, 96, 97, 200):
        tokens = product.tokens(rows)
        before = tokens.clone()
        found, expected = product(tokens), functional.linear(tokens, product.weight, product.bias)
        sizes = functional.linear(tokens.abs(), product.weight.abs(), product.bias.abs())
        assert ((found - expected).abs() / sizes).max() < TOLERANCES[precision], rows
        assert torch.equal(tokens, before)


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_comes_after_a_product(level: int, precision: str, activation: int) -> None:
    """Measured against the same product with nothing after it, so that only what follows counts."""
    product = Product(precision, 64, 45)
    tokens = product.tokens(19)
    plain = product(tokens)
    residual = torch.randn(19, 45)
    found = product(tokens, activation, residual)
    torch.testing.assert_close(found, ACTIVATIONS[activation](plain) + residual, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("rows", [11, 300])
def test_threads_change_nothing(precision: str, rows: int) -> None:
    product = Product(precision, 96, 200)
    tokens = product.tokens(rows)
    alone = product(tokens)
    for threads in (2, 3, 5):
        assert torch.equal(product(tokens, threads=threads), alone)


def shape_of(config: dict[str, Any], **changes: Any) -> Shape:
    return Shape.of({"model_type": "mpnet", **config, **changes})


def weights_of(shape: Shape, config: dict[str, Any]) -> dict[str, Tensor]:
    torch.manual_seed(3)
    found: dict[str, Tensor] = {}
    width, inner = shape.width, shape.inner
    sizes = {"word": config["vocab_size"], "position": config["max_position_embeddings"]}
    for name, count in sizes.items():
        found[f"embeddings.{name}_embeddings.weight"] = torch.randn(count, width)

    def add_norm(name: str) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = 1 + 0.2 * torch.randn(width), 0.2 * torch.randn(width)

    def add_product(name: str, inputs: int, outputs: int) -> None:
        found[f"{name}.weight"] = torch.randn(outputs, inputs) / inputs**0.5
        found[f"{name}.bias"] = 0.1 * torch.randn(outputs)

    add_norm("embeddings.LayerNorm")
    if shape.architecture == "mpnet":
        found["encoder.relative_attention_bias.weight"] = torch.randn(shape.buckets, shape.heads)
    for number in range(shape.layers):
        names = shape.names(number)
        for name in (*names.joined, names.output):
            add_product(name, width, width)
        add_product(names.up, width, inner)
        add_product(names.down, inner, width)
        add_norm(names.attention_norm)
        add_norm(names.norm)
    return found


def texts(lengths: list[int]) -> Packed:
    """With a padding token inside of a text, which a text may spell out."""
    torch.manual_seed(5)
    return Packed.of([[int(each) for each in torch.randint(0, 50, (length,))] for length in lengths])


def by_torch(shape: Shape, weights: dict[str, Tensor], packed: Packed) -> Tensor:
    with torch.inference_mode():
        return Network(shape, weights)(packed, lambda: None)


def network(shape: Shape, weights: dict[str, Tensor], precision: str) -> LayeredNetwork:
    if precision == "bfloat16":
        weights = halve(Network(shape, weights), weights, texts([3]))
    if precision == "int8":
        weights = quantize(Network(shape, weights), weights, texts(LENGTHS))
    return LayeredNetwork(shape, weights, precision)


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("config", [SMALL, ODD], ids=["even", "odd"])
@pytest.mark.parametrize("architecture", ["mpnet", "bert", "roberta"])
def test_a_network(level: int, precision: str, config: dict[str, Any], architecture: str) -> None:
    shape = shape_of(config, model_type=architecture)
    weights = weights_of(shape, config)
    made = network(shape, weights, precision)
    for lengths in ([1], [11], [40], [64], [65], [30, 30, 30], LENGTHS):
        packed = texts(lengths)
        found, expected = made(packed, lambda: None), by_torch(shape, weights, packed)
        if precision == "float32":
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
        assert functional.cosine_similarity(found, expected, dim=1).min() > 0.99


@pytest.mark.parametrize("precision", TYPES)
def test_a_text_sees_itself_alone(level: int, precision: str, default_threads: None) -> None:
    shape = shape_of(SMALL)
    made = network(shape, weights_of(shape, SMALL), precision)
    packed = texts(LENGTHS)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        together = packed.split(made(packed, lambda: None))
        for ids, expected in zip(packed.split(packed.ids), together, strict=True):
            alone = made(Packed.of([ids.tolist()]), lambda: None)
            torch.testing.assert_close(alone, expected, atol=2e-5, rtol=1e-4)
        assert torch.equal(torch.cat(together), made(packed, lambda: None))


@pytest.mark.parametrize("precision", TYPES)
def test_what_is_not_a_number_stays_with_its_text(level: int, precision: str) -> None:
    shape = shape_of(SMALL)
    weights = weights_of(shape, SMALL)
    broken = {**weights, "embeddings.word_embeddings.weight": weights["embeddings.word_embeddings.weight"].clone()}
    broken["embeddings.word_embeddings.weight"][49] = torch.nan
    clean, poisoned = Packed.of([[2] * 40, [3] * 40]), Packed.of([[2] * 40, [3] * 20 + [49] + [3] * 19])
    made = network(shape, weights, precision)
    expected = made(clean, lambda: None)
    struct = Builder(broken, "float32").pointer(broken["embeddings.word_embeddings.weight"], torch.float32, 50, 64)
    if made.network.embeddings.halves:
        halves = broken["embeddings.word_embeddings.weight"].bfloat16()
        struct = halves.data_ptr()
    made.network.embeddings.words = struct
    found = made(poisoned, lambda: None)
    assert found[40:].isnan().all()
    torch.testing.assert_close(found[:40], expected[:40], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("ids", [[50], [-1], [2] * 201], ids=["token", "negative", "position"])
def test_what_is_beyond_the_embeddings_is_refused(ids: list[int]) -> None:
    shape = shape_of(SMALL)
    made = network(shape, weights_of(shape, SMALL), "float32")
    with pytest.raises(IndexError):
        made(Packed.of([ids]), lambda: None)


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("part", ["bias", "weight"])
def test_weights_of_other_shapes_are_refused(precision: str, part: str) -> None:
    shape = shape_of(SMALL)
    weights = weights_of(shape, SMALL)
    if precision == "bfloat16":
        weights = halve(Network(shape, weights), weights, texts([3]))
    if precision == "int8":
        weights = quantize(Network(shape, weights), weights, texts([9]))
    name = f"encoder.layer.1.output.dense.{part if part == 'bias' or precision == 'float32' else 'panels'}"
    weights[name] = weights[name][:-1]
    with pytest.raises(ValueError, match="not of the shapes"):
        LayeredNetwork(shape, weights, precision)


def test_places_beyond_the_inputs_are_refused() -> None:
    shape = shape_of(SMALL)
    weights = quantize(Network(shape, weights_of(shape, SMALL)), weights_of(shape, SMALL), texts([9]))
    weights["encoder.layer.0.output.dense.places"][7] = 96
    with pytest.raises(ValueError, match="inputs that there are not"):
        LayeredNetwork(shape, weights, "int8")


def test_stages_are_timed() -> None:
    shape = shape_of(SMALL)
    seconds = (ctypes.c_double * len(layers.STAGES))()
    network(shape, weights_of(shape, SMALL), "int8")(texts(LENGTHS), lambda: None, seconds)
    assert all(seconds[layers.STAGES.index(stage)] > 0 for stage in ("embeddings", "attention", "up", "down"))


def test_layers_are_as_many_at_once_as_a_cancel_can_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = shape_of(SMALL)
    made = network(shape, weights_of(shape, SMALL), "float32")
    packed = texts(LENGTHS)
    calls: list[int] = []
    whole = made(packed, lambda: calls.append(1))
    assert len(calls) == 1
    monkeypatch.setattr(layers, "SLICE_FLOP", 0)
    calls.clear()
    assert torch.equal(made(packed, lambda: calls.append(1)), whole)
    assert len(calls) == shape.layers
