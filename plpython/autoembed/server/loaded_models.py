"""The models that a session has loaded: a few at most, the least recently used goes first."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from autoembed import settings
from autoembed.encoding.load import load_encoder
from autoembed.encoding.protocol import Encoder
from autoembed.errors import OutOfMemory
from autoembed.models import directory
from autoembed.models.model import MEGABYTE, Model
from autoembed.server import preloaded
from autoembed.server.status_file import StatusFile
from autoembed.settings import Settings

ROOM_HINT = "Raise EMBEDDING_MAX_MEMORY_MB in the server's environment and restart the server, or use a smaller model."


@dataclass
class LoadedModel:
    """An encoder, and how many texts it has had."""

    encoder: Encoder
    load_seconds: float
    loaded_at: float = field(default_factory=time.time)
    texts: int = 0

    def entry(self) -> dict[str, Any]:
        """Returns what the other sessions are told."""
        return {
            "model": self.encoder.model.name,
            "device": self.encoder.device,
            "preloaded": self.encoder.shared,
            "loaded_at": self.loaded_at,
            "load_seconds": self.load_seconds,
            "texts": self.texts,
        }


class LoadedModels:
    """A session's, by name, the least recently used first. Shared ones are the postmaster's: they take no room here."""

    def __init__(self, gd: dict[str, Any], status: StatusFile, log: Callable[[str], object]) -> None:
        self.gd = gd
        self.log = log
        self.status = status
        self.by_name: dict[str, LoadedModel] = {}

    def encoder(self, name: str | None) -> Encoder:
        """Returns the encoder of that name's model, loaded now if need be; again where its files have changed since."""
        current = settings.read()
        model = directory.find(current, name)
        found = self.by_name.pop(model.name, None)
        if found is not None and found.encoder.model.fingerprint != model.fingerprint:
            self.close([found])
            found = None
        is_new = found is None
        self.by_name[model.name] = found = found or self.opened(model, current)
        if is_new:
            self.tell()
        return found.encoder

    def opened(self, model: Model, current: Settings) -> LoadedModel:
        """Returns the model as the postmaster has loaded it, or else loads it."""
        started = time.monotonic()
        encoder = preloaded.take(self.gd, model, current)
        if encoder is None:
            self.make_room(model, current)
            encoder = load_encoder(model, current)
        seconds = time.monotonic() - started
        if not encoder.shared:
            megabytes = f"{model.bytes / MEGABYTE:.0f} MB of weights"
            self.log(f"autoembed: model {model.name} loaded on {encoder.device} in {seconds:.1f} s, {megabytes}")
        return LoadedModel(encoder, seconds)

    def make_room(self, model: Model, current: Settings) -> None:
        """Closes models for one more: within their number, and within the megabytes of weights."""
        most = None if current.max_memory_mb is None else current.max_memory_mb * MEGABYTE
        if most is not None and model.bytes > most:
            needs = f"its weights take {model.bytes // MEGABYTE} MB"
            reason = f"{needs}, and EMBEDDING_MAX_MEMORY_MB is {current.max_memory_mb}"
            raise OutOfMemory(name=model.name, reason=reason, hint=ROOM_HINT)
        gone = []
        own = [name for name, loaded in self.by_name.items() if not loaded.encoder.shared]
        while own and (len(own) >= current.max_models or (most is not None and self.weights() + model.bytes > most)):
            gone.append(self.by_name.pop(own.pop(0)))
        self.close(gone)

    def weights(self) -> int:
        """Returns the bytes of the weights that are this session's alone."""
        return sum(loaded.encoder.model.bytes for loaded in self.by_name.values() if not loaded.encoder.shared)

    def count(self, name: str, texts: int) -> None:
        """Adds to the texts that the model has had."""
        loaded = self.by_name.get(name)
        if loaded is not None and texts:
            loaded.texts += texts
            self.tell()

    def clear(self) -> int:
        """Closes all of them and gives their memory back; returns how many there were."""
        gone = list(self.by_name.values())
        self.by_name.clear()
        self.close(gone)
        return len(gone)

    def close(self, gone: Iterable[LoadedModel]) -> None:
        """Frees their weights, and of shared ones what this session has added: the weights are the postmaster's."""
        gone = list(gone)
        for loaded in gone:
            if loaded.encoder.shared:
                loaded.encoder.free_memory()
            else:
                loaded.encoder.close()
        if gone:
            self.tell()

    def free_memory(self) -> None:
        """Frees what only encoding needs."""
        for loaded in self.by_name.values():
            loaded.encoder.free_memory()

    def tell(self) -> None:
        self.status.write([loaded.entry() for loaded in self.by_name.values()])
