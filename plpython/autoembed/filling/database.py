"""Filling columns: which rows next, encode them while nothing is held, write them, let go.

The rules are DESIGN.md's "How a batch is embedded". Everything about rows is behind `Database`; everything about
vectors is behind `Encoder` and `batching`. This module holds their order, and what an error at each step means.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from traceback import clear_frames
from typing import Protocol, TypeVar

from autoembed.encoding import batching
from autoembed.encoding.protocol import Encoder
from autoembed.encoding.vectors import to_text

NOBODYS = ("08", "0A", "25", "26", "2D", "34", "3B", "3D", "3F", "40", "42", "53", "54", "55", "57", "58", "XX")
"""Classes of SQLSTATEs that speak of the server, the call or the relation. Any other that a write ends with is the
row's own: its constraint's, its policy's, or its trigger's, which chooses as it likes."""
REFUSED = "42501"
CANCELED = "57014"
OUT_OF_MEMORY = "53200"
TOO_LARGE = "54000"
"""What a claim ends with whose texts together are more than an array can hold, a gigabyte."""
BUSY = ("40001", "40P01", "55P03")
"""Another transaction was in the way."""
ATTEMPTS = 5
PASSES = 3
"""At most: rows that were changed or locked meanwhile get another chance, a busy table does not hold the call."""
BARREN = 1_000
"""So many rows one after another of which none could be embedded are a stretch that the next call begins behind."""


T = TypeVar("T")


@dataclass(frozen=True)
class Column:
    """A declared column, as a call sees it."""

    registration: int
    label: str
    model: str
    fingerprint: str
    dimensions: int
    shape: str


@dataclass(frozen=True)
class Candidates:
    """Keys that seem pending, and every lock that claiming them may take; how many rows were looked at for them."""

    keys: list[str]
    locks: list[int]
    cursor: str
    passed: int
    inflight: int


@dataclass(frozen=True)
class Frontier:
    """Where a call begins: behind a long stretch of rows that are `held` back, or else of rows that were filled."""

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
class Failed:
    """A row that could not be embedded, and why; `message` never quotes its text."""

    key: str
    hash: bytes
    kind: str
    message: str


@dataclass
class Round:
    """What one batch came to."""

    written: list[str] = field(default_factory=list)
    failed: list[Failed] = field(default_factory=list)
    truncated: list[tuple[str, int]] = field(default_factory=list)
    tokens: int = 0
    claim_seconds: float = 0.0
    encode_seconds: float = 0.0
    write_seconds: float = 0.0


class Database(Protocol):
    """The rows' side: each method but the last three is one function of sql/70_protocol.sql."""

    error: type[Exception]

    def candidates(self, column: Column, after: str | None, wanted: int) -> Candidates | None: ...
    def next_suspect(self, column: Column, after: str | None) -> Candidates | None: ...
    def frontier(self, column: Column) -> Frontier | None: ...
    def set_frontier(self, column: Column, key: str | None, last: str | None) -> None: ...
    def claim(self, column: Column, candidates: Candidates, alone: bool) -> Claim | None: ...
    def complete(
        self, column: Column, generation: int, keys: list[str], hashes: list[bytes], vectors: list[str]
    ) -> list[str]: ...
    def settle(self, column: Column, inflight: int, claim: Claim, result: Round, token_limit: int) -> None: ...
    def forget(self, column: Column, inflight: int) -> None: ...
    def release(self, locks: list[int]) -> None: ...
    def recover(self, column: Column) -> None: ...
    def authorize(self, column: Column) -> None: ...
    def tidy(self, column: Column) -> None: ...
    def sqlstate(self, error: Exception) -> str: ...
    def constraint(self, error: Exception) -> str | None: ...
    def check_interrupts(self) -> None: ...
    def commit(self) -> None: ...
    def rollback(self) -> None: ...


@dataclass
class Totals:
    """What a call came to; `skipped` rows were claimed and come again: changed, deleted or locked meanwhile."""

    embedded: int = 0
    failed: int = 0
    skipped: int = 0
    tokens: int = 0
    truncated: int = 0
    lost: int = 0


@dataclass
class Limits:
    """Where a call ends; `seconds` counts from its making."""

    rows: int | None = None
    seconds: int | None = None
    started: float = field(default_factory=time.monotonic)

    def room(self, totals: Totals, batch: int) -> int:
        """How many rows the next batch may have; 0 when the call is over."""
        if self.seconds is not None and time.monotonic() - self.started >= self.seconds:
            return 0
        if self.rows is None:
            return batch
        return max(0, min(batch, self.rows - totals.embedded - totals.failed - totals.skipped))


@dataclass
class Filler:
    """One column's fill within one call."""

    database: Database
    column: Column
    encoder: Callable[[], Encoder]
    totals: Totals
    limits: Limits
    batch: int
    progress: Callable[[Column, Totals], None]
    frontier: str | None = None
    """The key behind the last long stretch of rows that are held back."""
    last: str | None = None
    """The key of the last row, as the first pass that came to the end saw it."""
    loaded: Encoder | None = None
    """The encoder, once a row has needed it."""

    def run(self) -> None:
        """Suspects first, alone; then all that is pending, in key order; again for rows that were taken or changed."""
        self.again(partial(self.database.recover, self.column))
        self.fill_suspects()
        known = self.again(partial(self.database.frontier, self.column))
        if known is not None:
            self.frontier = known.key if known.held else None
            self.fill_once(known.key)
        for turn in range(PASSES):
            before = self.totals.embedded
            missed = self.fill_once()
            idle = turn > 0 and self.totals.embedded == before
            if not missed or idle or not self.limits.room(self.totals, 1):
                break
        if known is not None or self.frontier is not None or self.last is not None:
            self.again(partial(self.database.set_frontier, self.column, self.frontier, self.last))
        self.again(partial(self.database.tidy, self.column))

    def fill_suspects(self) -> None:
        after: str | None = None
        while self.limits.room(self.totals, 1):
            suspect = self.again(partial(self.database.next_suspect, self.column, after))
            if suspect is None:
                return
            after = suspect.keys[0]
            self.fill_batch(suspect, alone=True)

    def fill_once(self, after: str | None = None) -> int:
        """One pass up to the last key; how many rows it saw and left to others or to the next pass.

        Behind the last long stretch of rows that it could not embed, the next call begins; or where the limits ended
        this one, if it knew of such a stretch or embedded nothing: so calls that are always cut short come to each row.
        Behind a stretch of filled rows only new ones are sooner found: a call cut short there is followed by one from
        the first row on.
        """
        missed = barren = 0
        start, frontier = after, self.frontier if after is not None else None
        before = self.totals.embedded
        while room := self.limits.room(self.totals, self.batch):
            found = self.again(partial(self.database.candidates, self.column, after, room))
            if found is None:
                self.frontier = frontier
                self.last = self.last or after
                return missed
            embedded = self.totals.embedded
            if found.keys:
                try:
                    missed += self.fill_batch(found, alone=False)
                except self.database.error as error:
                    if self.database.sqlstate(error) != TOO_LARGE or len(found.keys) == 1:
                        raise
                    self.batch = len(found.keys) // 2
                    continue
            after = found.cursor
            barren = 0 if self.totals.embedded > embedded else barren + found.passed
            if barren >= BARREN:
                frontier = after
        if after != start and (frontier or self.frontier or self.totals.embedded == before):
            self.frontier = after
        return missed

    def fill_batch(self, found: Candidates, alone: bool) -> int:
        """Claim, encode, write, release; how many of the rows are for later. Locks never outlive it."""
        self.loaded = self.encoder()  # before the claim: a model that cannot be loaded holds nobody's rows
        try:
            return self.fly(found, self.loaded, alone)
        except BaseException as error:
            self.abandon(found, error)
            raise

    def fly(self, found: Candidates, encoder: Encoder, alone: bool) -> int:
        result = Round()
        started = time.monotonic()
        claim = self.again(partial(self.database.claim, self.column, found, alone), found.locks)
        result.claim_seconds = time.monotonic() - started
        self.totals.lost += 0 if claim is None else claim.lost
        if claim is None or not claim.keys:
            self.let_go(found)
            return 0 if claim is None else claim.lost
        started = time.monotonic()
        outcomes = self.encode(encoder, claim.contents)
        result.encode_seconds = time.monotonic() - started
        self.write(found.inflight, claim, outcomes, result, encoder.model.max_tokens)
        self.let_go(found)
        self.count(result, claim)
        return claim.lost + len(claim.keys) - len(result.written) - len(result.failed)

    def encode(self, encoder: Encoder, contents: Sequence[str]) -> list[batching.Vector | batching.Failure]:
        """Holds no snapshot, no transaction id and no row lock: the claim is committed."""
        return batching.encode_all(
            encoder, contents, prompt=encoder.model.prompts["document"], checkpoint=self.checkpoint
        )

    def checkpoint(self) -> None:
        """Python does not see a cancel by itself; the commit gives the snapshot back.

        The few bytes that the server does not get here are what the pass has taken.
        """
        try:
            self.database.check_interrupts()
            self.database.commit()
        except self.database.error as error:
            if self.database.sqlstate(error) != OUT_OF_MEMORY:
                raise
            self.database.rollback()
            raise MemoryError from None

    def write(
        self,
        inflight: int,
        claim: Claim,
        outcomes: Sequence[batching.Vector | batching.Failure],
        result: Round,
        token_limit: int,
    ) -> None:
        started = time.monotonic()
        good: list[int] = []
        texts: list[str] = []
        for position, outcome in enumerate(outcomes):
            if isinstance(outcome, batching.Vector):
                good.append(position)
                texts.append(to_text(outcome.values))
                result.tokens += min(outcome.tokens, token_limit)
                if outcome.truncated:
                    result.truncated.append((claim.keys[position], outcome.tokens))
            else:
                result.failed.append(
                    Failed(claim.keys[position], claim.hashes[position], outcome.kind, outcome.message)
                )

        def conclude() -> None:
            result.write_seconds = time.monotonic() - started
            self.database.settle(self.column, inflight, claim, result, token_limit)

        self.write_rows(claim, good, texts, result, conclude)

    def write_rows(
        self, claim: Claim, rows: list[int], texts: list[str], result: Round, conclude: Callable[[], None] | None
    ) -> None:
        """Write in one statement; where a row's own constraint or trigger refuses, in halves until it stands alone.

        A deferred constraint refuses at the commit, so each try ends with one. `conclude` writes the round's record
        and belongs to the last of these transactions.
        """
        try:
            written = self.write_once(claim, rows, texts, result, conclude)
        except self.database.error as error:
            self.database.rollback()
            state = self.database.sqlstate(error)
            if not rows or (state.startswith(NOBODYS) and state != REFUSED):
                raise
            self.database.authorize(self.column)  # 42501 of the call as a whole is nobody's row's
            if len(rows) == 1:
                key = claim.keys[rows[0]]
                result.failed.append(Failed(key, claim.hashes[rows[0]], "write", self.reason(error)))
                self.write_rows(claim, [], [], result, conclude)
                return
            half = len(rows) // 2
            self.write_rows(claim, rows[:half], texts[:half], result, None)
            self.write_rows(claim, rows[half:], texts[half:], result, conclude)
        else:
            if conclude is None:
                result.written.extend(written)

    def write_once(
        self, claim: Claim, rows: list[int], texts: list[str], result: Round, conclude: Callable[[], None] | None
    ) -> list[str]:
        """One transaction; `result` has its rows only once it is committed."""
        before = len(result.written)

        def transaction() -> list[str]:
            del result.written[before:]
            written: list[str] = []
            if rows:
                keys, hashes = [claim.keys[row] for row in rows], [claim.hashes[row] for row in rows]
                written = self.database.complete(self.column, claim.generation, keys, hashes, texts)
            if conclude is not None:
                result.written.extend(written)
                conclude()
            return written

        try:
            return self.again(transaction)
        except self.database.error:
            del result.written[before:]
            raise

    def again(self, transaction: Callable[[], T], locks: Sequence[int] = ()) -> T:
        """Run and commit; once more where another transaction was in the way.

        Or where the server has no memory left, and the encoder some to give back.

        `locks` are what a failed try may have taken: session locks outlive its rollback, and are counted.
        """
        for attempt in range(1, ATTEMPTS + 1):
            try:
                outcome = transaction()
                self.database.commit()
                return outcome
            except (self.database.error, MemoryError) as error:
                short = self.is_out_of_memory(error)
                again = self.loaded is not None if short else self.database.sqlstate(error) in BUSY
                if not again or attempt == ATTEMPTS:
                    raise
                self.database.rollback()
                if short:
                    self.rest(error)
                if locks:
                    self.database.release(list(locks))
                    self.database.commit()
        raise AssertionError("unreachable")

    def reason(self, error: Exception) -> str:
        """Never the error's own message: a trigger's may quote the row."""
        state = self.database.sqlstate(error)
        constraint = self.database.constraint(error)
        if constraint:
            return f"constraint {constraint} refused the vector ({state})"
        if state == REFUSED:
            return "row-level security refused the vector (42501)"
        return f"a trigger or constraint of the table refused the vector ({state})"

    def count(self, result: Round, claim: Claim) -> None:
        totals = self.totals
        totals.embedded += len(result.written)
        totals.failed += len(result.failed)
        totals.skipped += len(claim.keys) - len(result.written) - len(result.failed)
        totals.tokens += result.tokens
        totals.truncated += len(result.truncated)
        self.again(partial(self.progress, self.column, totals))

    def let_go(self, found: Candidates) -> None:
        self.database.release(found.locks)
        self.database.commit()

    def abandon(self, found: Candidates, error: BaseException) -> None:
        """After an error: nothing half-written, no inflight row, no lock left in a pooled session.

        The locks are given back even where the row cannot be deleted (a full disk, a transaction that became
        read-only): a row whose lock is free blames nobody.
        """
        if self.is_out_of_memory(error):
            self.rest(error)
        try:
            self.clean(partial(self.database.forget, self.column, found.inflight))
        finally:
            self.clean(partial(self.database.release, found.locks))

    def clean(self, step: Callable[[], None]) -> None:
        """Again where a second cancel hits right here, or memory is short; others give way to the one on its way."""
        left = ATTEMPTS
        while True:
            try:
                self.database.rollback()
                step()
                self.database.commit()
                return
            except (self.database.error, MemoryError) as error:
                left -= 1
                if self.is_out_of_memory(error) and left > 0:
                    self.rest(error)
                elif isinstance(error, MemoryError) or self.database.sqlstate(error) != CANCELED:
                    self.database.rollback()
                    return

    def is_out_of_memory(self, error: BaseException) -> bool:
        if isinstance(error, MemoryError):
            return True
        return isinstance(error, self.database.error) and self.database.sqlstate(error) == OUT_OF_MEMORY

    def rest(self, error: BaseException) -> None:
        """Give back what the encoder keeps between two batches, and what the error's frames hold."""
        clear_frames(error.__traceback__)
        if self.loaded is not None:
            self.loaded.rest()
