"""sentence-transformers behind the encoder's protocol."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from autoembed.encoding.interrupts import nothing
from autoembed.encoding.protocol import Tokenized
from autoembed.encoding.reading import Reader
from autoembed.errors import BrokenModel, MissingPackage, OutOfMemory
from autoembed.process import environment, memory, threads

if TYPE_CHECKING:
    from autoembed.models.model import Model
    from autoembed.settings import Settings

PRECISION = "float32"

# (texts, padded tokens) of one micro-batch. On a CPU padding and big temporaries cost more than small batches do.
CPU_BATCH = (8, 2048)
GPU_BATCH = (128, 32768)


def open_folder(folder: Path, device: str) -> Any:
    """Opens a SentenceTransformer from local files: float32, safetensors only, none of the model's own code."""
    try:
        environment.set_up_libraries()
        import torch
        from sentence_transformers import SentenceTransformer
    except ModuleNotFoundError as error:
        raise MissingPackage(package=error.name, purpose="the encoder") from None
    return SentenceTransformer(
        str(folder),
        device=device,
        trust_remote_code=False,
        local_files_only=True,
        token=False,
        model_kwargs={"dtype": torch.float32, "use_safetensors": True},
    ).eval()


def encode_texts(transformer: Any, texts: Sequence[str], prompt: str = "") -> Any:
    """Makes one forward pass. The prompt is always given: an empty one keeps the model's default prompt away."""
    return transformer.encode(
        list(texts), prompt=prompt, batch_size=len(texts), show_progress_bar=False, convert_to_numpy=True
    )


def reader(transformer: Any, max_tokens: int) -> Reader:
    """Of the very tokenizer that it encodes with."""
    tokenizer = transformer.tokenizer
    return Reader(tokenizer.backend_tokenizer, max_tokens, tokenizer.truncation_side)


class StEncoder:
    def __init__(self, model: Model, transformer: Any, device: str) -> None:
        self.model = model
        self._settle(device)
        self.pads = True
        self.interruptible = False
        self.shared = False
        self._transformer = transformer
        self._reader = reader(transformer, model.max_tokens)

    @classmethod
    def load(cls, model: Model, settings: Settings, device: str) -> StEncoder:
        if model.precision != PRECISION:
            reason = f"sentence-transformers serves it on {device}, and that in {PRECISION}, not {model.precision}"
            raise BrokenModel(name=model.name, reason=reason, hint="Add it again without --precision.")
        if settings.threads is not None:
            threads.use(settings.threads)
        transformer = _open(model, device)
        transformer.max_seq_length = model.max_tokens
        return cls(model, transformer, device)

    def tokenize(
        self, texts: Sequence[str], prompt: str = "", checkpoint: Callable[[], None] = nothing
    ) -> list[Tokenized]:
        """It gets the texts themselves, cut to what the model reads: they are tokenized once more by the encoder."""
        return [
            Tokenized(reading.tokens, len(reading.ids), (prompt, reading.text))
            for reading in self._reader.read(texts, prompt, checkpoint)
        ]

    def encode(self, texts: Sequence[Tokenized], checkpoint: Callable[[], None]) -> NDArray[np.float32]:  # noqa: ARG002
        (prompt,) = {text.content[0] for text in texts}
        try:
            vectors = encode_texts(self._transformer, [text.content[1] for text in texts], prompt)
        except (MemoryError, RuntimeError):
            self._release()
            raise
        return np.asarray(vectors, dtype=np.float32)

    def move(self, device: str) -> None:
        """Moves the weights to another device: what the postmaster has preloaded goes there after the fork."""
        self._transformer.to(device)
        self._settle(device)

    def _settle(self, device: str) -> None:
        self.device = device
        self.max_texts, self.token_budget = CPU_BATCH if device == "cpu" else GPU_BATCH

    def use_threads(self, fixed: int | None) -> None:
        if fixed is not None:
            threads.use(fixed)

    def free_memory(self) -> None:
        self._release()

    def close(self) -> None:
        self._transformer = None
        self._release()

    def _release(self) -> None:
        """Gives a device's memory back: its allocator keeps what a failed pass took."""
        memory.trim()
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.empty_cache()


def _open(model: Model, device: str) -> Any:
    try:
        return open_folder(model.path, device)
    except MemoryError:
        raise OutOfMemory(name=model.name, reason="its weights do not fit") from None
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, ImportError) as error:
        if "out of memory" in str(error).lower():
            raise OutOfMemory(name=model.name, reason=f"its weights do not fit on {device}") from None
        raise BrokenModel(name=model.name, reason=f"loading it raised {type(error).__name__}: {error}") from error
