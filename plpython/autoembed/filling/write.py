"""Writes what an encoder made of a claim, and records it in the same transaction."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from autoembed.encoding.batching import Vector
from autoembed.encoding.vectors import to_text
from autoembed.filling.records import BatchResult, Claim, Column, Failed
from autoembed.filling.sqlstates import REFUSED, is_rows_own

if TYPE_CHECKING:
    from autoembed.encoding.batching import Failure
    from autoembed.filling.database import FillDatabase
    from autoembed.filling.transactions import Transactions


LOCKED_SECONDS = 0.04
"""As long as one transaction may hold the locks of the rows that it writes."""


@dataclass
class Experience:
    """What a fill has learned about its table from the writes so far."""

    changed: dict[str, bytes] = field(default_factory=dict)
    """The rows whose texts triggers of the table have changed, with the hash that was tried first."""
    rows: int = 32
    """So many the next transaction writes. With an HNSW index, or triggers, a row may take a millisecond or more."""
    seconds_a_row: float | None = None

    def learn(self, rows: int, seconds: float) -> None:
        """Adapts to a transaction that wrote so many rows in so long a time.

        A small one tells nothing where it was quick: what each transaction costs, whatever it writes, would count.
        The mean with what was known keeps one slow flush of the log from making many small transactions.
        """
        if rows < self.rows and seconds <= LOCKED_SECONDS:
            return
        latest = max(seconds, 1e-6) / rows
        self.seconds_a_row = latest if self.seconds_a_row is None else (self.seconds_a_row + latest) / 2
        self.rows = max(1, min(int(LOCKED_SECONDS / self.seconds_a_row), 2 * self.rows))


@dataclass
class Writer:
    """One claim's write; `vectors` has pgvector's text form by the row's position in the claim."""

    database: FillDatabase
    transactions: Transactions
    column: Column
    inflight: int
    claim: Claim
    token_limit: int
    result: BatchResult
    experience: Experience
    vectors: dict[int, str] = field(default_factory=dict)
    unsettled: Exception | None = None
    """What the batch's record was refused with, last: whatever its SQLSTATE says, no row is to blame."""
    started: float = field(default_factory=time.monotonic)

    def write(self, outcomes: Sequence[Vector | Failure]) -> None:
        for row, outcome in enumerate(outcomes):
            if isinstance(outcome, Vector):
                self.vectors[row] = to_text(outcome.values)
                self.result.tokens += min(outcome.tokens, self.token_limit)
                if outcome.truncated:
                    self.result.truncated.append((self.claim.keys[row], outcome.tokens))
            else:
                self.fail(row, outcome.kind, outcome.message)
        self.write_by_time(list(self.vectors))

    def write_by_time(self, rows: list[int]) -> None:
        """Writes them in as many transactions as keep each row's lock short: whoever updates a row waits for that."""
        is_last = False
        while not is_last:
            size = self.experience.rows
            is_last = len(rows) <= size
            began = time.monotonic()
            self.write_rows(rows[:size], is_last=is_last)
            if rows:
                self.experience.learn(len(rows[:size]), time.monotonic() - began)
            rows = rows[size:]

    def fail(self, row: int, kind: str, message: str) -> None:
        key, tried = self.claim.keys[row], self.claim.hashes[row]
        self.result.failed.append(Failed(key, tried, tried, kind, message))

    def write_rows(self, rows: list[int], *, is_last: bool) -> None:
        """Writes them in one statement; where a row's own constraint or trigger refuses, in halves until it is alone.

        A deferred constraint refuses at the commit, so each try ends with one. The last of these transactions writes
        the batch's record, too.
        """
        try:
            self.write_once(rows, is_last=is_last)
        except self.database.error as error:
            self.database.rollback()
            if not rows or error is self.unsettled or not is_rows_own(self.database.sqlstate(error)):
                raise
            self.database.authorize(self.column)  # 42501 of the call as a whole is nobody's row's
            if len(rows) == 1:
                self.fail(rows[0], "write", refusal(self.database, error))
                self.write_rows([], is_last=is_last)
                return
            half = len(rows) // 2
            self.write_rows(rows[:half], is_last=False)
            self.write_rows(rows[half:], is_last=is_last)

    def write_once(self, rows: list[int], *, is_last: bool) -> None:
        """Writes them in one transaction; the result has them only once it is committed."""
        written, failed = len(self.result.written), len(self.result.failed)

        def forget() -> None:
            del self.result.written[written:]
            del self.result.failed[failed:]

        def transaction() -> dict[str, bytes]:
            forget()
            changed = self.complete(rows) if rows else {}
            if is_last:
                self.settle()
            return changed

        try:
            changed = self.transactions.in_transaction(transaction)
        except self.database.error:
            forget()
            raise
        for key, tried in changed.items():
            self.experience.changed.setdefault(key, tried)

    def complete(self, rows: list[int]) -> dict[str, bytes]:
        """Returns the rows whose texts a trigger of the table has changed, with the hash that was tried."""
        keys, hashes = [self.claim.keys[row] for row in rows], [self.claim.hashes[row] for row in rows]
        vectors = [self.vectors[row] for row in rows]
        outcome = self.database.complete(
            self.column, self.claim.generation, keys, hashes, vectors, ends_transaction=True
        )
        self.result.written.extend(outcome.keys)
        tried = dict(zip(keys, hashes, strict=True)) if outcome.refused else {}
        for key, left_hash in zip(outcome.refused, outcome.left_hashes, strict=True):
            self.judge(key, tried[key], left_hash)
        left = zip(outcome.refused, outcome.left_hashes, strict=True)
        return {key: tried[key] for key, left_hash in left if left_hash != tried[key]}

    def judge(self, key: str, tried: bytes, left_hash: bytes | None) -> None:
        """Judges a row that a trigger of the table keeps from its vector: it fails, or it comes again.

        A trigger that makes texts uniform leaves one that it will not change again, which is tried at once. One that
        changes each text that it sees would have the row encoded without end, as would one that takes vectors away.
        """
        if left_hash == tried:
            message = "a trigger of the table keeps the vector from being written"
        elif left_hash is not None and key in self.experience.changed:
            message = "a trigger of the table changes the text with each write"
        else:
            return
        self.result.failed.append(Failed(key, self.experience.changed.get(key, tried), left_hash, "write", message))

    def settle(self) -> None:
        self.result.write_seconds = time.monotonic() - self.started
        try:
            self.database.settle(self.column, self.inflight, self.claim, self.result, self.token_limit)
        except self.database.error as error:
            self.unsettled = error
            raise


def refusal(database: FillDatabase, error: Exception) -> str:
    """Says what refused a vector. Never the error's own message: a trigger's may quote the row."""
    state = database.sqlstate(error)
    constraint = database.constraint(error)
    if constraint:
        return f"constraint {constraint} refused the vector ({state})"
    if state == REFUSED:
        return "row-level security refused the vector (42501)"
    return f"a trigger or constraint of the table refused the vector ({state})"
