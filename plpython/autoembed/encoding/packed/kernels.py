"""The package's C, called through ctypes: attention.c and layers.c."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec

from torch import Tensor

LIBRARY = "autoembed.encoding.packed._kernels"
MOST = 4
"""All that layers.c knows of processors."""


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


@cache
def layers() -> ctypes.CDLL:
    """Returns layers.c, told to compute with all that this processor has."""
    found = library()
    if found is None:
        raise RuntimeError("this installation was built without a C compiler")
    pointer, number = ctypes.c_void_p, ctypes.c_long
    found.autoembed_layers_space.restype = found.autoembed_product_space.restype = number
    found.autoembed_layers_space.argtypes = [pointer, number, number, ctypes.c_int]
    found.autoembed_layers.argtypes = [pointer, pointer, number, number, ctypes.c_int]
    found.autoembed_product_space.argtypes = [number, pointer, number, ctypes.c_int]
    found.autoembed_product.argtypes = [
        number,
        pointer,
        pointer,
        number,
        number,
        pointer,
        pointer,
        pointer,
        ctypes.c_int,
    ]
    found.autoembed_processor(MOST)
    return found


def are_quick() -> bool:
    """Tells whether layers.c has this processor's own instructions: its general form is slower than torch."""
    return library() is not None and bool(layers().autoembed_processor(MOST))
