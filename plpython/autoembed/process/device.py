"""Which device encodes: EMBEDDING_DEVICE, or the best one that torch finds."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

from autoembed.errors import DeviceUnavailable

GPU_FILES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/kfd")
"""One of them is there wherever CUDA or ROCm can be: by NVIDIA's driver, by WSL's, by AMD's."""


def resolve(wanted: str) -> str:
    """Returns the device to be used; raises DeviceUnavailable where torch does not find it."""
    if wanted == "auto":
        return next(device for device in ("cuda", "mps", "cpu") if available(device))
    if not available(wanted):
        raise DeviceUnavailable(device=wanted)
    return wanted


def available(device: str) -> bool:
    """Says whether torch finds it; of a device with a number, whether there are so many."""
    import torch

    kind, _, number = device.partition(":")
    if kind == "cuda":
        return torch.cuda.is_available() and int(number or 0) < torch.cuda.device_count()
    if device == "mps":
        return torch.backends.mps.is_available()
    return device == "cpu"


def check(wanted: str) -> str:
    """Returns what is known of it; raises DeviceUnavailable. Where torch is not loaded, it is not loaded for that."""
    if "torch" in sys.modules:
        return f"EMBEDDING_DEVICE is {wanted}: models run on {resolve(wanted)}"
    kind = wanted.partition(":")[0]
    if (kind == "cuda" and not _may_have_cuda()) or (kind == "mps" and sys.platform != "darwin"):
        raise DeviceUnavailable(device=wanted)
    return f"EMBEDDING_DEVICE is {wanted}; torch is asked for it when a model is loaded"


def _may_have_cuda() -> bool:
    built_for_cpu = "+cpu" in importlib.metadata.version("torch")
    return not built_for_cpu and any(Path(file).exists() for file in GPU_FILES)


def name_of(device: str) -> str:
    """Returns for people the device with its hardware's name."""
    import torch

    if device.partition(":")[0] != "cuda":
        return device
    return f"{device} ({torch.cuda.get_device_name(device)})"
