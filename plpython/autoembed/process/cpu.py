"""What this machine's processor computes quickly: a precision that it has to emulate is slower than float32."""

from __future__ import annotations

import platform
import time
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
SLOW_GFLOPS = 10.0
BLAS_HINT = "This looks like the reference BLAS, which makes embedding many times slower. Debian: libopenblas0-openmp."
# Any one of them will do.
NEEDED = {
    "float32": frozenset[str](),
    "bfloat16": frozenset({"avx512_bf16", "amx_bf16", "bf16"}),
    "int8": frozenset({"avx512_vnni", "avx_vnni", "amx_int8"}),
}


def flags(file: Path = CPUINFO) -> frozenset[str]:
    """Returns the processor's, which Linux names `flags` on x86 and `Features` on ARM."""
    if not file.exists():
        return frozenset()
    found = (line.partition(":") for line in file.read_text().splitlines())
    return next(
        (frozenset(value.split()) for name, _, value in found if name.strip() in ("flags", "Features")), frozenset()
    )


def lacks(precision: str) -> str | None:
    """Returns why this precision would be slower here than float32, or None."""
    needed = NEEDED[precision]
    if not needed or needed & flags():
        return None
    names = ", ".join(sorted(needed))
    return f"this processor ({platform.machine()}) has none of {names}: {precision} would be slower than float32"


def blas(maps: Path = Path("/proc/self/maps")) -> str | None:
    """Returns the file of the system's BLAS, if that is what torch was linked to; None where torch carries its own."""
    lines = maps.read_text().splitlines() if maps.exists() else []
    return min((line.split()[-1] for line in lines if "/libblas.so" in line), default=None)


def matmul_gflops(size: int = 768) -> float:
    """Returns the speed of the best of three float32 products, after one to warm up."""
    import torch

    left, right = torch.rand(size, size), torch.rand(size, size)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        torch.mm(left, right)
        seconds.append(time.perf_counter() - start)
    return float(2 * size**3 / min(seconds[1:]) / 1e9)
