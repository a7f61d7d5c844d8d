"""Faults inside the test servers' backends: the servers are started with this directory in PYTHONPATH.

Models named stub-… get an encoder of a few lines, which starts in no time and goes wrong on given words. All encoders
obey the files in the directory AUTOEMBED_FAULTS, which a test writes while the server runs:
    pace      seconds that each micro-batch takes longer
    hold      "pid n": that backend's encoding waits from its n-th micro-batch on, while this file is there
    kill      a text with this word in it kills the backend
    encoding  written by the backends: a line for each micro-batch
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

STEERED = "autoembed.encoding.load"


class Steered:
    """An encoder that obeys the files."""

    def __init__(self, encoder: Any, directory: Path) -> None:
        self._encoder = encoder
        self._directory = directory
        self._encoded = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def tokenize(self, texts: Sequence[str], *rest: Any) -> list[Any]:
        """The encoder's own, each with its text beside it."""
        tokenized = self._encoder.tokenize(texts, *rest)
        return [replace(each, content=(text, each)) for text, each in zip(texts, tokenized, strict=True)]

    def encode(self, texts: Sequence[Any], checkpoint: Callable[[], None]) -> Any:
        self._encoded += 1
        with (self._directory / "encoding").open("a") as log:
            log.write(f"{os.getpid()} {len(texts)}\n")
        word = self._read("kill")
        if word and any(word in text.content[0] for text in texts):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(float(self._read("pace") or 0))
        while self._held():
            time.sleep(0.01)
        return self._encoder.encode([text.content[1] for text in texts], checkpoint)

    def _held(self) -> bool:
        pid, first = self._read("hold").split() or ("0", "0")
        return int(pid) == os.getpid() and self._encoded >= int(first)

    def _read(self, name: str) -> str:
        try:
            return (self._directory / name).read_text().strip()
        except FileNotFoundError:
            return ""


class Stub:
    """A text's vector is random, but always the same."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.device = "cpu"
        self.max_texts = 8
        self.token_budget = 2048
        self.pads = True
        self.interruptible = False
        self.shared = False

    def tokenize(self, texts: Sequence[str], prompt: str = "", checkpoint: Any = None) -> list[Any]:  # noqa: ARG002
        from autoembed.encoding.protocol import Tokenized

        whole = [prompt + text for text in texts]
        tokens = [len(text.split()) + 2 for text in whole]
        limit = self.model.max_tokens
        return [Tokenized(count, min(count, limit), text) for count, text in zip(tokens, whole, strict=True)]

    def encode(self, texts: Sequence[Any], checkpoint: Callable[[], None]) -> Any:
        import numpy as np

        if len(texts) > 1 and any("hoardword" in text.content for text in texts):
            hoarded = hoard()
            checkpoint()
            del hoarded
        if "broken" in self.model.name:
            raise ValueError("no text can be encoded")
        contents = [text.content for text in texts]
        vectors = np.stack([self._vector(text) for text in contents])
        return vectors[:, :-1] if any("shortword" in text for text in contents) else vectors

    def _vector(self, text: str) -> Any:
        import numpy as np

        if "raiseword" in text:
            raise ValueError(f"cannot encode {text}")
        if "hugeword" in text:
            raise MemoryError(text)
        if "zeroword" in text:
            return np.zeros(self.model.dimensions, np.float32)
        if "nanword" in text:
            return np.full(self.model.dimensions, np.nan, np.float32)
        seed = hashlib.sha256(f"{self.model.fingerprint} {text}".encode()).digest()
        vector = np.random.default_rng(list(seed)).standard_normal(self.model.dimensions)
        return (vector / np.linalg.norm(vector)).astype(np.float32)

    def use_threads(self, fixed: int | None) -> None:
        pass

    def free_memory(self) -> None:
        pass

    def close(self) -> None:
        pass


def hoard() -> list[bytearray]:
    """All the memory that there is."""
    hoarded, size = [], 1 << 24
    while size >= 16:
        try:
            hoarded.append(bytearray(size))
        except MemoryError:
            size //= 2
    return hoarded


class Finder:
    """Lets the package's module load as it is, and steers what its `load_encoder` returns."""

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        if name != STEERED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            module.load_encoder = steered(module.load_encoder, module.check_files)  # type: ignore[attr-defined]

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def steered(load: Callable[..., Any], check_files: Callable[[Any], None]) -> Callable[..., Any]:
    def load_steered(model: Any, settings: Any) -> Any:
        if model.name.startswith("stub-"):
            check_files(model)
            encoder = Stub(model)
        else:
            encoder = load(model, settings)
        return Steered(encoder, Path(os.environ["AUTOEMBED_FAULTS"]))

    return load_steered


sys.meta_path.insert(0, Finder())

if "AUTOEMBED_TEST_TOOLS" in os.environ:
    runpy.run_path(str(Path(__file__).parents[1] / "backend" / "sitecustomize.py"))
