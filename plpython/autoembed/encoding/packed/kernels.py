"""The package's C: attention.c and int8.c, called through ctypes."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec

from torch import Tensor

LIBRARY = "autoembed.encoding.packed._kernels"


@cache
def library() -> ctypes.CDLL | None:
    """Loads the kernels, after torch, whose OpenMP threads they share; None where there was no compiler."""
    spec = find_spec(LIBRARY)
    return None if spec is None or spec.origin is None else ctypes.CDLL(spec.origin)


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def pointers(*tensors: Tensor | None) -> ctypes.Array[ctypes.c_void_p]:
    """Returns a C struct of pointers."""
    return (ctypes.c_void_p * len(tensors))(*map(pointer, tensors))
