"""Weights in int8 (opt-in), as `model add` makes them: each product's column as bytes with a scale.

Weights are symmetric, one scale an output; layers.c gives each row of tokens a scale and a least value of its own, so
that a text's vector does not depend on the texts beside it. The few inputs of each product that are far larger than all
others stay float32, as in LLM.int8 (Dettmers et al. 2022); which ones is seen once, when the model is added. Products
are exact in 32 bits; norms and activations stay float32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from autoembed.encoding.packed.layers import OUTLIERS, panels, serves
from autoembed.encoding.packed.network import Linear, Network, Packed, UnsupportedNetwork

STEPS = 127


def quantize(network: Network, weights: Mapping[str, Tensor], texts: Packed) -> dict[str, Tensor]:
    """Returns what `model add` writes in place of the weights: all matrix products in bytes, anything else as it is.

    Raises UnsupportedNetwork where that is not computed.
    """
    if reason := serves(network.shape):
        raise UnsupportedNetwork(f"int8 is not computed here: {reason}")
    kept = dict(weights)
    for number, largest in enumerate(watch(network, texts)):
        for names, inputs in zip(network.shape.names(number).products, largest, strict=True):
            weight = torch.cat([kept.pop(f"{name}.weight").float() for name in names])
            bias = torch.cat([kept.pop(f"{name}.bias").float() for name in names])
            kept |= {f"{names[0]}.{part}": tensor for part, tensor in quantized(weight, inputs).items()}
            kept[f"{names[0]}.bias"] = bias
    return {name: tensor.float() if tensor.dtype.is_floating_point else tensor for name, tensor in kept.items()}


def quantized(weight: Tensor, largest: Tensor) -> dict[str, Tensor]:
    """Returns a weight in bytes; `largest` is what each input has been seen to be at most.

    `sums` is each output's sum of weights; `outliers` (OUTLIERS x outputs) are the weights of the inputs at `places`.
    """
    places = largest.topk(OUTLIERS).indices.sort().values
    outliers = weight[:, places].t().contiguous()
    rest = weight.index_fill(1, places, 0.0)
    scales = rest.abs().amax(1).clamp(min=1e-30) / STEPS
    steps = (rest / scales[:, None]).round().to(torch.int8)
    sums = steps.sum(1, dtype=torch.int32).float() * scales
    return {"panels": panels(steps), "scales": scales, "sums": sums, "outliers": outliers, "places": places}


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
