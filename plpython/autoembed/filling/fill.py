"""Fills columns: which rows next, encode them while nothing is held, write them, release them.

The rules are docs/architecture.md's "How a batch is embedded". Everything about rows is behind `FillDatabase`;
everything about vectors is behind `Encoder` and `batching`. This module holds their order, and what an error at each
step means.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Concatenate, ParamSpec, TypeVar

from autoembed.encoding import batching
from autoembed.encoding.protocol import Encoder
from autoembed.filling.database import FillDatabase
from autoembed.filling.records import BatchResult, Candidates, Column, Limits, Totals
from autoembed.filling.sqlstates import TOO_LARGE
from autoembed.filling.transactions import Transactions
from autoembed.filling.write import Experience, Writer

PASSES = 3
"""At most: rows that were changed or locked meanwhile get another chance, a busy table does not hold the call."""
HELD_STRETCH = 1_000
"""So many rows one after another of which none could be embedded are a stretch that the next call begins behind."""

P = ParamSpec("P")
R = TypeVar("R")


@dataclass
class Filler:
    """One column's fill within one call."""

    database: FillDatabase
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
    experience: Experience = field(default_factory=Experience)
    transactions: Transactions = field(init=False)

    def __post_init__(self) -> None:
        self.transactions = Transactions(self.database, self.free_memory)

    def run(self) -> None:
        """Fills suspects first, alone; then all that is pending, in key order; again what was taken or changed."""
        self.ask(self.database.recover)
        self.fill_suspects()
        known = self.ask(self.database.frontier)
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
            self.ask(self.database.set_frontier, self.frontier, self.last)
        self.ask(self.database.tidy)

    def ask(self, question: Callable[Concatenate[Column, P], R], *arguments: P.args, **options: P.kwargs) -> R:
        """Asks the database about the column, in a transaction of its own."""
        return self.transactions.in_transaction(partial(question, self.column, *arguments, **options))

    def fill_suspects(self) -> None:
        after: str | None = None
        while self.limits.room(self.totals, 1):
            suspect = self.ask(self.database.next_suspect, after)
            if suspect is None:
                return
            after = suspect.keys[0]
            self.fill_batch(suspect, alone=True)

    def fill_once(self, after: str | None = None) -> int:
        """Makes one pass up to the last key; returns how many rows it saw and left to others or to the next pass.

        Behind the last long stretch of rows that it could not embed, the next call begins; or where the limits ended
        this one, if it knew of such a stretch or embedded nothing: so calls that are always cut short come to each row.
        Behind a stretch of filled rows only new ones are sooner found: a call cut short there is followed by one from
        the first row on.
        """
        missed = held = 0
        start, frontier = after, self.frontier if after is not None else None
        before = self.totals.embedded
        while room := self.limits.room(self.totals, self.batch):
            found = self.ask(self.database.candidates, after, room)
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
            held = 0 if self.totals.embedded > embedded else held + found.passed
            if held >= HELD_STRETCH:
                frontier = after
        if after != start and (frontier or self.frontier or self.totals.embedded == before):
            self.frontier = after
        return missed

    def fill_batch(self, found: Candidates, alone: bool) -> int:
        """Claims, encodes, writes and releases; returns how many of the rows are for later. Locks never outlive it."""
        self.loaded = self.encoder()  # before the claim: a model that cannot be loaded holds nobody's rows
        try:
            return self.claim_encode_write(found, self.loaded, alone)
        except BaseException as error:
            self.abandon(found, error)
            raise

    def claim_encode_write(self, found: Candidates, encoder: Encoder, alone: bool) -> int:
        result = BatchResult()
        started = time.monotonic()
        release = partial(self.database.release, found.locks)  # a failed try's rollback leaves its session locks
        claim = self.transactions.in_transaction(partial(self.database.claim, self.column, found, alone), release)
        result.claim_seconds = time.monotonic() - started
        self.totals.lost += 0 if claim is None else claim.lost
        if claim is None or not claim.keys:
            self.release(found)
            return 0 if claim is None else claim.lost
        started = time.monotonic()
        outcomes = self.encode(encoder, claim.contents)
        result.encode_seconds = time.monotonic() - started
        limit = encoder.model.max_tokens
        writer = Writer(
            self.database, self.transactions, self.column, found.inflight, claim, limit, result, self.experience
        )
        writer.write(outcomes)
        self.release(found)
        self.totals.add(result, len(claim.keys))
        self.transactions.in_transaction(partial(self.progress, self.column, self.totals))
        return claim.lost + len(claim.keys) - len(result.written) - len(result.failed)

    def encode(self, encoder: Encoder, contents: Sequence[str]) -> list[batching.Vector | batching.Failure]:
        """Holds no snapshot, no transaction id and no row lock: the claim is committed."""
        return batching.encode_all(
            encoder, contents, prompt=encoder.model.prompts["document"], checkpoint=self.checkpoint
        )

    def checkpoint(self) -> None:
        """Lets a cancel through, which Python does not see by itself; the commit gives the snapshot back.

        The few bytes that the server does not get here are what the pass has taken.
        """
        try:
            self.database.check_interrupts()
            self.database.commit()
        except self.database.error as error:
            if not self.transactions.is_out_of_memory(error):
                raise
            self.database.rollback()
            raise MemoryError from None

    def release(self, found: Candidates) -> None:
        self.database.release(found.locks)
        self.database.commit()

    def abandon(self, found: Candidates, error: BaseException) -> None:
        """Leaves nothing half-written after an error, no inflight row, and no lock in a pooled session.

        The locks are given back even where the row cannot be deleted (a full disk, a transaction that became
        read-only): a row whose lock is free blames nobody. The error on its way is the one that the user is told.
        """
        if self.transactions.is_out_of_memory(error):
            self.transactions.free_memory(error)
        try:
            self.undo(partial(self.database.forget, self.column, found.inflight))
        finally:
            self.undo(partial(self.database.release, found.locks))

    def undo(self, step: Callable[[], None]) -> None:
        with suppress(self.database.error, MemoryError):
            self.transactions.undo(step)

    def free_memory(self) -> bool:
        """Frees what the encoder keeps between two batches; returns False where none is loaded."""
        if self.loaded is None:
            return False
        self.loaded.free_memory()
        return True
