"""What the machine could do at best: the rate of plain matrix products of a model's weight shapes."""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from bench.architectures import Architecture

ROWS = 512
REPEATS = 6
# Without one of these flags bfloat16 is emulated, and slower than float32.
BFLOAT16_FLAGS = ("avx512_bf16", "amx_bf16")


def gflop_per_second(precision: str, architecture: Architecture) -> float:
    """The median over the shapes of the best of a few products each."""
    width, inner = architecture.width, architecture.inner
    shapes = ((width, width), (width, 3 * width), (width, inner), (inner, width))
    product = int8_product if precision == "int8" else float_product(getattr(torch, precision))
    with torch.inference_mode():
        return median(_rate(product(*shape), *shape) for shape in shapes)


def unmeasurable(precision: str) -> str | None:
    """Why this CPU's figure for a precision would say nothing."""
    if precision == "bfloat16" and not any(flag in cpu_flags() for flag in BFLOAT16_FLAGS):
        return f"this CPU has neither {' nor '.join(BFLOAT16_FLAGS)}"
    return None


def cpu_flags() -> set[str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return {flag for line in lines if line.startswith("flags") for flag in line.partition(":")[2].split()}


def float_product(dtype: torch.dtype) -> Callable[[int, int], Callable[[], object]]:
    def product(inputs: int, outputs: int) -> Callable[[], object]:
        tokens = torch.randn(ROWS, inputs).to(dtype)
        weights = torch.randn(outputs, inputs).to(dtype)
        return lambda: torch.nn.functional.linear(tokens, weights)

    return product


def int8_product(inputs: int, outputs: int) -> Callable[[], object]:
    tokens = torch.randint(-128, 127, (ROWS, inputs), dtype=torch.int8)
    weights = torch.randint(-128, 127, (outputs, inputs), dtype=torch.int8)
    return lambda: torch._int_mm(tokens, weights.T)


def _rate(product: Callable[[], object], inputs: int, outputs: int) -> float:
    product()
    return 2.0 * ROWS * inputs * outputs / min(_timed(product) for _ in range(REPEATS)) / 1e9


def _timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started
