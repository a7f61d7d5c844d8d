"""Loads the encoder that serves a model: the one module that knows both encoders."""

from __future__ import annotations

from autoembed.encoding.protocol import Encoder
from autoembed.errors import OutOfMemory
from autoembed.models.directory import check_files
from autoembed.models.model import MEGABYTE, PACKED_ENCODER, Model
from autoembed.process import environment, memory, signals
from autoembed.process.device import resolve
from autoembed.settings import Settings


@signals.kept()
@memory.uncollected()
def load_encoder(model: Model, settings: Settings) -> Encoder:
    """Checks the files, then loads the weights: that takes seconds, and hundreds of megabytes."""
    if settings.max_memory_mb is not None and model.bytes > settings.max_memory_mb * MEGABYTE:
        needs = (
            f"its weights take {model.bytes // MEGABYTE} MB, and EMBEDDING_MAX_MEMORY_MB is {settings.max_memory_mb}"
        )
        raise OutOfMemory(name=model.name, reason=needs)
    check_files(model)
    environment.set_environment()  # before torch is imported: its OpenMP reads the environment only then
    device = resolve(settings.device)
    if model.encoder == PACKED_ENCODER and device == "cpu":
        from autoembed.encoding.packed.encoder import PackedEncoder

        return PackedEncoder.load(model, settings)
    from autoembed.encoding.reference import StEncoder

    return StEncoder.load(model, settings, device)
