"""Matrix products in the precisions that a model can be registered with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class FloatLinear:
    """float32, on the weights as their file has them mapped: all processes share the pages.

    Parts that stand side by side (query, key, value) are written into one matrix; copying their weights into one
    would gain next to nothing and cost each process a quarter of the model.
    """

    def __init__(self, weights: Mapping[str, Tensor], names: Sequence[str]) -> None:
        self.parts = [(weights[f"{name}.weight"].float().t(), weights[f"{name}.bias"].float()) for name in names]
        self.outputs = sum(len(bias) for _, bias in self.parts)

    def __call__(self, tokens: Tensor, out: Tensor) -> Tensor:
        place = 0
        for weight, bias in self.parts:
            torch.addmm(bias, tokens, weight, out=out[:, place : place + len(bias)])
            place += len(bias)
        return out

    def add_to(self, tokens: Tensor, residual: Tensor) -> Tensor:
        ((weight, bias),) = self.parts
        residual += bias
        return residual.addmm_(tokens, weight)
