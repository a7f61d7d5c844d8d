"""The models that a session has loaded: a few at most, the least recently used goes first."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, cast

from autoembed import settings
from autoembed.encoding.load import load_encoder
from autoembed.encoding.protocol import Encoder
from autoembed.errors import OutOfMemory
from autoembed.models import directory
from autoembed.models.model import MEGABYTE, Model
from autoembed.server import preloaded
from autoembed.server.preloaded import Inherited
from autoembed.server.status_file import Page
from autoembed.settings import Settings

ROOM_HINT = "Raise EMBEDDING_MAX_MEMORY_MB in the server's environment and restart the server, or use a smaller model."


class Loaded:
    """An encoder that counts its texts."""

    def __init__(self, encoder: Encoder, seconds: float, changed: Callable[[], None]) -> None:
        self.encoder = encoder
        self.seconds = seconds
        self.loaded_at = time.time()
        self.texts = 0
        self.changed = changed

    def __getattr__(self, name: str) -> Any:
        return getattr(self.encoder, name)

    def encode(self, texts: Sequence[Any], *arguments: Any) -> Any:
        found = self.encoder.encode(texts, *arguments)
        self.texts += len(texts)
        self.changed()
        return found

    @property
    def preloaded(self) -> bool:
        return isinstance(self.encoder, Inherited)

    def describe(self) -> dict[str, Any]:
        return {
            "model": self.encoder.model.name,
            "device": self.encoder.device,
            "preloaded": self.preloaded,
            "loaded_at": self.loaded_at,
            "load_seconds": self.seconds,
            "texts": self.texts,
        }


class Cache:
    """By name, the least recently used first. Preloaded models are the postmaster's: they take no room here."""

    def __init__(self, gd: dict[str, Any], page: Page) -> None:
        self.gd = gd
        self.loaded: dict[str, Loaded] = {}
        self.page = page

    def encoder(self, name: str | None) -> Encoder:
        """The loaded model of that name, loaded now if need be; again where its files have changed since."""
        current = settings.read()
        model = directory.find(current, name)
        return self.get(
            model, current, lambda: preloaded.take(self.gd, model, current), lambda: load_encoder(model, current)
        )

    def get(
        self, model: Model, current: Settings, take: Callable[[], Encoder | None], load: Callable[[], Encoder]
    ) -> Encoder:
        """The loaded encoder of this very model; else `take`n from the postmaster's, else `load`ed."""
        found = self.loaded.pop(model.name, None)
        if found is not None and found.encoder.model.fingerprint != model.fingerprint:
            self.close([found])
            found = None
        if found is None:
            started = time.monotonic()
            encoder = take()
            if encoder is None:
                self.make_room(model, current)
                encoder = load()
            found = Loaded(encoder, time.monotonic() - started, self.tell)
            self.loaded[model.name] = found
            self.tell()
        self.loaded[model.name] = found
        return cast("Encoder", found)

    def make_room(self, model: Model, current: Settings) -> None:
        """For one more: within the number of models, and within the megabytes of weights."""
        most = None if current.max_memory_mb is None else current.max_memory_mb * MEGABYTE
        if most is not None and model.bytes > most:
            needs = f"its weights take {model.bytes // MEGABYTE} MB"
            reason = f"{needs}, and EMBEDDING_MAX_MEMORY_MB is {current.max_memory_mb}"
            raise OutOfMemory(name=model.name, reason=reason, hint=ROOM_HINT)
        gone = []
        own = [name for name, loaded in self.loaded.items() if not loaded.preloaded]
        while own and (len(own) >= current.max_models or (most is not None and self.weights() + model.bytes > most)):
            gone.append(self.loaded.pop(own.pop(0)))
        self.close(gone)

    def weights(self) -> int:
        return sum(loaded.encoder.model.bytes for loaded in self.loaded.values() if not loaded.preloaded)

    def clear(self) -> int:
        """All of them, their memory given back; how many there were."""
        gone = list(self.loaded.values())
        self.loaded.clear()
        self.close(gone)
        return len(gone)

    def close(self, gone: list[Loaded]) -> None:
        for loaded in gone:
            loaded.encoder.close()
        if gone:
            self.tell()

    def rest(self) -> None:
        """Give back what only encoding needs."""
        for loaded in self.loaded.values():
            loaded.encoder.rest()

    def tell(self) -> None:
        self.page.write([loaded.describe() for loaded in self.loaded.values()])
