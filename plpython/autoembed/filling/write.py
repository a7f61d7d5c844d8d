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
    vectors: dict[int, str] = field(default_factory=dict)
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
        self.write_rows(list(self.vectors), is_last=True)

    def fail(self, row: int, kind: str, message: str) -> None:
        self.result.failed.append(Failed(self.claim.keys[row], self.claim.hashes[row], kind, message))

    def write_rows(self, rows: list[int], *, is_last: bool) -> None:
        """Writes them in one statement; where a row's own constraint or trigger refuses, in halves until it is alone.

        A deferred constraint refuses at the commit, so each try ends with one. The last of these transactions writes
        the batch's record, too.
        """
        try:
            self.write_once(rows, is_last=is_last)
        except self.database.error as error:
            self.database.rollback()
            if not rows or not is_rows_own(self.database.sqlstate(error)):
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
        before = len(self.result.written)

        def transaction() -> None:
            del self.result.written[before:]
            if rows:
                self.result.written.extend(self.complete(rows))
            if is_last:
                self.settle()

        try:
            self.transactions.in_transaction(transaction)
        except self.database.error:
            del self.result.written[before:]
            raise

    def complete(self, rows: list[int]) -> list[str]:
        keys, hashes = [self.claim.keys[row] for row in rows], [self.claim.hashes[row] for row in rows]
        vectors = [self.vectors[row] for row in rows]
        return self.database.complete(self.column, self.claim.generation, keys, hashes, vectors)

    def settle(self) -> None:
        self.result.write_seconds = time.monotonic() - self.started
        self.database.settle(self.column, self.inflight, self.claim, self.result, self.token_limit)


def refusal(database: FillDatabase, error: Exception) -> str:
    """Says what refused a vector. Never the error's own message: a trigger's may quote the row."""
    state = database.sqlstate(error)
    constraint = database.constraint(error)
    if constraint:
        return f"constraint {constraint} refused the vector ({state})"
    if state == REFUSED:
        return "row-level security refused the vector (42501)"
    return f"a trigger or constraint of the table refused the vector ({state})"
