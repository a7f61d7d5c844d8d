"""What this machine's processor computes quickly: a precision that it has to emulate is slower than float32."""

from __future__ import annotations

import platform
import re
import time
from pathlib import Path

from autoembed.process.threads import blas_libraries

CPUINFO = Path("/proc/cpuinfo")
OTHERS = "scipy"
"""In the name of the BLAS that numpy and scipy carry, each its own."""
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


def blas() -> str:
    """Returns by which library torch multiplies in float32; the reference BLAS is known by no name but torch's."""
    import torch

    mine = [library for library in blas_libraries() if OTHERS not in library.prefix]
    if mine:
        return f"{mine[0].internal_api} {mine[0].version}, {mine[0].threading_layer}, for {mine[0].architecture}"
    found = re.search(r"BLAS_INFO=(\w+)", torch._C._show_config())
    return found[1] if found else "unknown"


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
