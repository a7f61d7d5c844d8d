"""From a vector per token to a vector per text: what modules.json lists after the transformer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from autoembed.encoding.packed.network import Packed, UnsupportedNetwork
from autoembed.models.layout import Layout, Module, read_json

Head = Callable[[Tensor], Tensor]
Pooling = Callable[[Tensor, Packed], Tensor]

LEGACY_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
ACTIVATIONS: dict[str, Head] = {
    "Identity": lambda vectors: vectors,
    "Tanh": torch.tanh,
    "ReLU": torch.relu,
    "GELU": functional.gelu,
    "Sigmoid": torch.sigmoid,
}
LEAST_NORM = 1e-12  # as torch.nn.functional.normalize


def mean(tokens: Tensor, packed: Packed) -> Tensor:
    return torch.stack([part.sum(0) / len(part) for part in packed.split(tokens)])


def cls(tokens: Tensor, packed: Packed) -> Tensor:
    return tokens[packed.bounds[:-1]]


def highest(tokens: Tensor, packed: Packed) -> Tensor:
    return torch.stack([part.amax(0) for part in packed.split(tokens)])


POOLINGS: dict[str, Pooling] = {"mean": mean, "cls": cls, "max": highest}


class Dense:
    def __init__(self, weights: Mapping[str, Tensor], activation: Head) -> None:
        self.weight = weights["linear.weight"].float()
        self.bias = weights["linear.bias"].float() if "linear.bias" in weights else None
        self.activation = activation

    def __call__(self, vectors: Tensor) -> Tensor:
        return self.activation(functional.linear(vectors, self.weight, self.bias))


def normalize(vectors: Tensor) -> Tensor:
    return functional.normalize(vectors, eps=LEAST_NORM)


def build(layout: Layout, tensors: Callable[[Path], Mapping[str, Tensor]]) -> tuple[Pooling, list[Head]]:
    """Builds the pooling and the heads; `tensors` gives those of a module's folder. Raises UnsupportedNetwork."""
    kinds = [module.kind for module in layout.modules[1:]]
    if not kinds or kinds[0] != "Pooling":
        raise UnsupportedNetwork("its second module is no Pooling")
    heads = [_head(layout, module, tensors) for module in layout.modules[2:] if module.kind != "Dropout"]
    return _pooling(read_json(layout.folder / layout.modules[1].path / "config.json", layout.name)), heads


def _pooling(config: Mapping[str, Any]) -> Pooling:
    listed = config.get("pooling_mode")
    modes = [listed] if isinstance(listed, str) else list(listed or [])
    modes = modes or [mode for key, mode in LEGACY_MODES.items() if config.get(key)]
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise UnsupportedNetwork(f"its pooling {' and '.join(modes) or 'mode'} is not among {', '.join(POOLINGS)}")
    if not config.get("include_prompt", True):
        raise UnsupportedNetwork("its pooling leaves the prompt out")
    return POOLINGS[modes[0]]


def _head(layout: Layout, module: Module, tensors: Callable[[Path], Mapping[str, Tensor]]) -> Head:
    if module.kind == "Normalize":
        return normalize
    if module.kind != "Dense":
        raise UnsupportedNetwork(f"its module {module.kind} is not among Pooling, Dense and Normalize")
    folder = layout.folder / module.path
    activation = str(read_json(folder / "config.json", layout.name).get("activation_function", "Tanh"))
    kind = activation.removeprefix("torch.nn.modules.").rsplit(".", 1)[-1]
    if kind not in ACTIVATIONS:
        raise UnsupportedNetwork(f"its activation {activation} is not among {', '.join(ACTIVATIONS)}")
    return Dense(tensors(folder), ACTIVATIONS[kind])
