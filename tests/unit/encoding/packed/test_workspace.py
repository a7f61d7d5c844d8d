"""The matrices between layers: one place for those that are never needed at once, and never an old one beside its
larger successor."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.nn import functional

from autoembed.encoding.packed.network import NORMED_AT_ONCE, Norm, Workspace


def test_matrices_side_by_side_take_the_place_of_one() -> None:
    space = Workspace(torch.float32)
    whole = space.take("products", 5, 4)
    left, right = space.split("products", 5, 3, 1)
    assert (left.shape, right.shape) == ((5, 3), (5, 1))
    assert left.is_contiguous()
    assert right.is_contiguous()
    assert left.data_ptr() == whole.data_ptr() == right.data_ptr() - 5 * 3 * 4


def test_the_old_one_is_gone_before_there_is_a_larger_one(monkeypatch: pytest.MonkeyPatch) -> None:
    space = Workspace(torch.float32)
    former = weakref.ref(space.take("products", 2, 2))
    kept = weakref.ref(space._kept["products"])
    empty = torch.empty
    alive: list[Any] = []

    def allocate(*arguments: Any, **options: Any) -> torch.Tensor:
        alive.append((former(), kept()))
        return empty(*arguments, **options)

    monkeypatch.setattr(torch, "empty", allocate)
    space.take("products", 4, 4)
    assert alive == [(None, None)]


@pytest.mark.parametrize("rows", [1, NORMED_AT_ONCE, 2 * NORMED_AT_ONCE + 1])
def test_a_norm_is_torchs_own_in_place(rows: int) -> None:
    weights = {"norm.weight": torch.rand(48), "norm.bias": torch.randn(48)}
    tokens = torch.randn(rows, 48)
    expected = functional.layer_norm(tokens, (48,), weights["norm.weight"], weights["norm.bias"], 1e-5)
    assert Norm(weights, "norm", 1e-5)(tokens) is tokens
    assert torch.equal(tokens, expected)
