"""Which device encodes: EMBEDDING_DEVICE, or the best one that torch finds."""

from autoembed.errors import DeviceUnavailable


def resolve(wanted: str) -> str:
    if wanted == "auto":
        return next(device for device in ("cuda", "mps", "cpu") if available(device))
    if not available(wanted):
        raise DeviceUnavailable(device=wanted)
    return wanted


def available(device: str) -> bool:
    import torch

    if device == "cuda":
        return torch.cuda.is_available()
    if device == "mps":
        return torch.backends.mps.is_available()
    return device == "cpu"


def name_of(device: str) -> str:
    """Returns for people the device with its hardware's name."""
    import torch

    if device != "cuda":
        return device
    return f"cuda ({torch.cuda.get_device_name()})"
