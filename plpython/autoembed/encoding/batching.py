"""Texts to vectors: cut into micro-batches by tokens, split around what fails, every vector checked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from traceback import clear_frames
from typing import TYPE_CHECKING, TypeVar

from autoembed.encoding import vectors
from autoembed.errors import EncoderBroken, OutOfMemory

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from autoembed.encoding.protocol import Encoder, Tokenized

# Where a cancel acts only between micro-batches: the second that it may take leaves room for a slow one.
MICRO_BATCH_SECONDS = 0.4
FIRST_MICRO_BATCH_TOKENS = 512
# But no smaller than this. On a busy machine a pass costs what its threads wait for a core, however few its tokens:
# cutting on would multiply the passes and gain nothing. In units of tokens times bytes of weights.
LEAST_MICRO_BATCH_WORK = 512 * 200_000_000
# Characters that are tokenized without a look at interrupts: some tenths of a second.
TOKENIZED_AT_ONCE = 250_000
PLAIN_WORD = "word"
MEMORY_WORDS = ("out of memory", "allocate memory", "could not create a primitive")
"""PyTorch's and CUDA's, and all that oneDNN says when it gets no memory."""


@dataclass
class Vector:
    values: NDArray[np.float32]
    tokens: int
    truncated: bool


@dataclass
class Failure:
    """Why a text has no vector is its `kind`: 'encoder', 'vector' or 'memory'. The message never quotes the text."""

    kind: str
    message: str


Outcome = Vector | Failure
T = TypeVar("T")


def encode_all(
    encoder: Encoder,
    texts: Sequence[str],
    *,
    prompt: str,
    checkpoint: Callable[[], None],
    token_budget: int | None = None,
) -> list[Outcome]:
    """Returns a vector or a failure for each text, in order. Equal texts are encoded once, and have the same outcome.

    `checkpoint` runs before every micro-batch and, where the encoder can be interrupted, within it. What it raises
    passes untouched, MemoryError excepted: a cancel is no text's fault.
    """
    positions = {text: position for position, text in enumerate(dict.fromkeys(texts))}
    batch = _Batch(encoder, list(positions), prompt, checkpoint, token_budget or encoder.token_budget)
    batch.run()
    return [batch.outcomes[positions[text]] for text in texts]


class _Pace:
    """Decides how many tokens the next micro-batch may have, from how long the last ones took; padding counts."""

    def __init__(self, budget: int, weights: int, *, adapts: bool) -> None:
        self.budget = budget
        self.adapts = adapts
        self.allowed = min(budget, FIRST_MICRO_BATCH_TOKENS) if adapts else budget
        self.least = max(64, min(FIRST_MICRO_BATCH_TOKENS, LEAST_MICRO_BATCH_WORK // max(weights, 1)))

    def took(self, tokens: int, seconds: float) -> None:
        if not self.adapts:
            return
        affordable = int(tokens * MICRO_BATCH_SECONDS / max(seconds, 1e-6))
        self.allowed = max(1, min(self.budget, max(self.least, affordable)))

    def ran_out_of_memory(self, tokens: int) -> None:
        self.budget = max(1, min(self.budget, tokens // 2))
        self.allowed = min(self.allowed, self.budget)


class _Batch:
    def __init__(
        self, encoder: Encoder, texts: Sequence[str], prompt: str, checkpoint: Callable[[], None], budget: int
    ) -> None:
        self.encoder = encoder
        self.texts = texts
        self.prompt = prompt
        self.asked = checkpoint
        self.interrupt: BaseException | None = None
        self.pace = _Pace(budget, encoder.model.bytes, adapts=not encoder.interruptible)
        self.tokenized: dict[int, Tokenized] = {}
        self.outcomes: dict[int, Outcome] = {}

    def run(self) -> None:
        for indexes in self._readable():
            for part in self._succeeding(indexes, self._tokenize_part):
                self.tokenized.update(part)
        remaining = sorted(self.tokenized, key=lambda index: self.tokenized[index].length)
        while remaining:
            size = self._fitting(remaining)
            self._encode(remaining[:size])
            del remaining[:size]

    def checkpoint(self) -> None:
        """Remembers what was raised, so that no handler below mistakes it for an encoder's error.

        Memory is what the encoder has taken: to run out of it here is as good as there.
        """
        try:
            self.asked()
        except MemoryError:
            raise
        except BaseException as interrupt:
            self.interrupt = interrupt
            raise

    def _readable(self) -> Iterator[list[int]]:
        """Yields portions for the tokenizer, by characters; a text that it chokes on is found by halving."""
        portion: list[int] = []
        characters = 0
        for index, text in enumerate(self.texts):
            if portion and characters + len(text) > TOKENIZED_AT_ONCE:
                yield portion
                portion, characters = [], 0
            portion.append(index)
            characters += len(text)
        if portion:
            yield portion

    def _tokenize_part(self, indexes: Sequence[int]) -> dict[int, Tokenized]:
        tokenized = self.encoder.tokenize([self.texts[index] for index in indexes], self.prompt, self.checkpoint)
        return dict(zip(indexes, tokenized, strict=True))

    def _fitting(self, remaining: Sequence[int]) -> int:
        """Returns how many of the shortest remaining texts make the next micro-batch."""
        size = 1
        most = min(self.encoder.max_texts, len(remaining))
        while size < most and self._cost(remaining[: size + 1]) <= self.pace.allowed:
            size += 1
        return size

    def _cost(self, indexes: Sequence[int]) -> int:
        """Returns their tokens; a text that could not even be tokenized counts as one."""
        lengths = [self.tokenized[index].length if index in self.tokenized else 1 for index in indexes]
        return len(lengths) * max(lengths) if self.encoder.pads else sum(lengths)

    def _encode(self, indexes: Sequence[int]) -> None:
        for part in self._succeeding(indexes, self._encode_part):
            self.outcomes.update(part)

    def _encode_part(self, indexes: Sequence[int]) -> dict[int, Outcome]:
        start = time.monotonic()
        found = self.encoder.encode([self.tokenized[index] for index in indexes], self.checkpoint)
        self.pace.took(self._cost(indexes), time.monotonic() - start)
        return {index: self._checked(index, found[row]) for row, index in enumerate(indexes)}

    def _checked(self, index: int, values: NDArray[np.float32]) -> Outcome:
        if problem := vectors.problem(values, self.encoder.model):
            return Failure("vector", problem)
        tokenized = self.tokenized[index]
        return Vector(values, tokenized.tokens, tokenized.truncated)

    def _succeeding(
        self, indexes: Sequence[int], work: Callable[[Sequence[int]], dict[int, T]]
    ) -> Iterator[dict[int, T]]:
        """Works on all, or on halves of what fails; a text that fails alone gets its failure."""
        stack = [indexes] if indexes else []
        freed: set[int] = set()
        while stack:
            part = stack.pop()
            try:
                self.checkpoint()
                done = work(part)
            except BaseException as error:
                if error is self.interrupt or not _is_fault(error):
                    raise
                clear_frames(error.__traceback__)  # which hold the pass's matrices; the next one needs their place
                failed = error
            else:
                yield done
                continue
            if _is_out_of_memory(failed):
                self.encoder.free_memory()
                self.pace.ran_out_of_memory(self._cost(part))
                if len(part) == 1 and part[0] not in freed:  # what earlier ones had left allocated is free now
                    freed.add(part[0])
                    stack.append(part)
                    continue
            if len(part) == 1:
                self.outcomes[part[0]] = self._failure(failed)
            else:
                middle = len(part) // 2
                stack += [part[middle:], part[:middle]]

    def _failure(self, error: BaseException) -> Failure:
        """Returns the text's failure, once a plain word shows that the encoder itself still works."""
        try:
            self.checkpoint()
            self.encoder.encode(self.encoder.tokenize([PLAIN_WORD]), self.checkpoint)
        except BaseException as broken:
            if broken is self.interrupt or not _is_fault(broken):
                raise
            kind = OutOfMemory if _is_out_of_memory(broken) else EncoderBroken
            raise kind(name=self.encoder.model.name, reason=type(broken).__name__) from None
        if _is_out_of_memory(error):
            return Failure("memory", "there is not enough memory to encode this text")
        return Failure("encoder", f"the encoder raised {type(error).__name__}")


def _is_fault(error: BaseException) -> bool:
    """Tells a fault from a cancel. A panic in Rust code is no Exception, and its message may quote the text."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError | OSError) and any(words in str(error).lower() for words in MEMORY_WORDS)
