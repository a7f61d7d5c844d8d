"""From a vector per token to a vector per text: what modules.json lists after the transformer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from autoembed.encoding.packed.network import Packed, UnsupportedNetwork
from autoembed.models.layout import Layout, Module, read_object

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
TANH = "torch.nn.modules.activation.Tanh"
LEAST_NORM = 1e-12  # as torch.nn.functional.normalize


PLACE = "sentence_embedding"


def mean(tokens: Tensor, packed: Packed) -> Tensor:
    return torch.stack([part.sum(0) / len(part) for part in packed.split(tokens)])


def mean_of_root(tokens: Tensor, packed: Packed) -> Tensor:
    """Divides the sum by the square root of the length."""
    return torch.stack([part.sum(0) / len(part) ** 0.5 for part in packed.split(tokens)])


def weighted_mean(tokens: Tensor, packed: Packed) -> Tensor:
    """Counts a token the more, the later it stands (Muennighoff 2022)."""
    return torch.stack([_weighted(part) for part in packed.split(tokens)])


def _weighted(part: Tensor) -> Tensor:
    weights = torch.arange(1, len(part) + 1, dtype=part.dtype)
    return weights @ part / weights.sum()


def first(tokens: Tensor, packed: Packed) -> Tensor:
    return tokens[packed.bounds[:-1]]


def last(tokens: Tensor, packed: Packed) -> Tensor:
    return tokens[packed.bounds[1:] - 1]


def highest(tokens: Tensor, packed: Packed) -> Tensor:
    return torch.stack([part.amax(0) for part in packed.split(tokens)])


POOLINGS: dict[str, Pooling] = {
    "mean": mean,
    "cls": first,
    "max": highest,
    "lasttoken": last,
    "weightedmean": weighted_mean,
    "mean_sqrt_len_tokens": mean_of_root,
}


class Dense:
    def __init__(self, weights: Mapping[str, Tensor], activation: Head) -> None:
        self.weight = weights["linear.weight"].float()
        self.bias = weights["linear.bias"].float() if "linear.bias" in weights else None
        self.activation = activation

    def __call__(self, vectors: Tensor) -> Tensor:
        return self.activation(functional.linear(vectors, self.weight, self.bias))


class LayerNorm:
    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weight, self.bias = weights["norm.weight"].float(), weights["norm.bias"].float()

    def __call__(self, vectors: Tensor) -> Tensor:
        return functional.layer_norm(vectors, self.weight.shape, self.weight, self.bias)


def normalize(vectors: Tensor) -> Tensor:
    return functional.normalize(vectors, eps=LEAST_NORM)


def truncate(dimensions: int, vectors: Tensor) -> Tensor:
    return vectors[:, :dimensions]


def build(layout: Layout, tensors: Callable[[Path], Mapping[str, Tensor]]) -> tuple[Pooling, list[Head]]:
    """Builds the pooling and the heads; `tensors` gives those of a module's folder. Raises UnsupportedNetwork."""
    kinds = [module.kind for module in layout.modules[1:]]
    if not kinds or kinds[0] != "Pooling":
        raise UnsupportedNetwork("its second module is no Pooling")
    heads = [_head(layout, module, tensors) for module in layout.modules[2:] if module.kind != "Dropout"]
    if layout.truncate_dim is not None:
        heads.append(partial(truncate, layout.truncate_dim))
    return _pooling(_config(layout, layout.modules[1])), heads


def _config(layout: Layout, module: Module) -> Mapping[str, Any]:
    """Returns a module's settings; Normalize has none where an old version wrote the folder."""
    path = layout.folder / module.path / "config.json"
    return read_object(path, layout.name) if module.kind != "Normalize" or path.is_file() else {}


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
    config = _config(layout, module)
    if any((config.get(key) or PLACE) != PLACE for key in ("module_input_name", "module_output_name")):
        raise UnsupportedNetwork(f"its module {module.kind} works on something else than a text's vector")
    if module.kind == "Normalize":
        return normalize
    if module.kind == "LayerNorm":
        return LayerNorm(tensors(layout.folder / module.path))
    if module.kind != "Dense":
        raise UnsupportedNetwork(f"its module {module.kind} is not among Pooling, Dense, LayerNorm and Normalize")
    if config.get("use_residual"):
        raise UnsupportedNetwork("its module Dense adds its input")
    return Dense(tensors(layout.folder / module.path), _activation(str(config.get("activation_function", TANH))))


def _activation(name: str) -> Head:
    """Returns one of torch's; any other is Tanh to sentence-transformers."""
    kind = name.rsplit(".", 1)[-1]
    if not name.startswith("torch.nn.") or kind not in ACTIVATIONS:
        raise UnsupportedNetwork(f"its activation {name} is not among {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[kind]
