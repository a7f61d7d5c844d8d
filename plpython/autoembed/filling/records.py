"""The records that a fill passes on: a column, what it claims of it, and what came of that."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Column:
    """A declared column, as a call sees it."""

    registration: int
    label: str
    model: str
    fingerprint: str
    dimensions: int
    column_sql: str


@dataclass(frozen=True)
class Candidates:
    """Keys that seem pending, every lock that claiming them may take, and how many rows were looked at for them."""

    keys: list[str]
    locks: list[int]
    cursor: str
    passed: int
    inflight: int


@dataclass(frozen=True)
class Frontier:
    """The key at which a call begins: behind a long stretch of rows that are `held` back, or else that were filled."""

    key: str
    held: bool


@dataclass(frozen=True)
class Claim:
    """Rows that are this session's until they are released: keys, texts and the texts' hashes, in one order."""

    generation: int
    keys: list[str]
    contents: list[str]
    hashes: list[bytes]
    lost: int


@dataclass(frozen=True)
class Written:
    """The rows of a write that have their vectors now, and those that a trigger of the table keeps from it.

    `left_hashes` are of the texts that the triggers have left in the refused rows.
    """

    keys: list[str]
    refused: list[str]
    left_hashes: list[bytes | None]


@dataclass(frozen=True)
class Failed:
    """A row that could not be embedded, and why; `message` never quotes its text.

    `hash` is of the text that is held back. That is the text that was tried, unless a trigger changes it.
    """

    key: str
    tried: bytes
    hash: bytes
    kind: str
    message: str


@dataclass
class BatchResult:
    """The keys that a batch has written, its failures, and its figures."""

    written: list[str] = field(default_factory=list)
    failed: list[Failed] = field(default_factory=list)
    truncated: list[tuple[str, int]] = field(default_factory=list)
    tokens: int = 0
    claim_seconds: float = 0.0
    encode_seconds: float = 0.0
    write_seconds: float = 0.0


@dataclass
class Totals:
    """How many rows a call has handled; `skipped` ones come again: they were changed, deleted or locked meanwhile."""

    embedded: int = 0
    failed: int = 0
    skipped: int = 0
    tokens: int = 0
    truncated: int = 0
    lost: int = 0

    def add(self, result: BatchResult, claimed: int) -> None:
        self.embedded += len(result.written)
        self.failed += len(result.failed)
        self.skipped += claimed - len(result.written) - len(result.failed)
        self.tokens += result.tokens
        self.truncated += len(result.truncated)


@dataclass
class Limits:
    """The rows and the seconds after which a call ends; they count from the making of this."""

    rows: int | None = None
    seconds: int | None = None
    started: float = field(default_factory=time.monotonic)

    def room(self, totals: Totals, batch: int) -> int:
        """Returns how many rows the next batch may have; 0 when the call is over."""
        if self.seconds is not None and time.monotonic() - self.started >= self.seconds:
            return 0
        if self.rows is None:
            return batch
        return max(0, min(batch, self.rows - totals.embedded - totals.failed - totals.skipped))
