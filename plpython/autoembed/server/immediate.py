"""Immediate mode: a statement's new rows are embedded as the statement ends. A model never fails the statement."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from autoembed import settings
from autoembed.encoding import batching
from autoembed.errors import AutoembedError
from autoembed.filling.records import BatchResult, Claim, Column, Written
from autoembed.filling.sqlstates import OUT_OF_MEMORY
from autoembed.filling.transactions import Transactions
from autoembed.filling.write import Experience, Writer
from autoembed.server.calls import encoder_of
from autoembed.server.database import SessionDatabase, column_of
from autoembed.server.refusals import Answer

if TYPE_CHECKING:
    from autoembed.server.loaded_models import LoadedModels

T = TypeVar("T")

NOT_IN_FLIGHT = 0
"""A statement's rows are its transaction's until that ends: nobody else sees them, and none of them is in flight."""
REASONS = 3
"""As many different ones a warning names."""


class StatementDatabase(SessionDatabase):
    """The database within a writer's statement, whose transaction is the writer's to end."""

    def rollback(self) -> None:
        """Does nothing: what was refused was undone with its subtransaction."""

    def complete(
        self,
        column: Column,
        generation: int,
        keys: list[str],
        hashes: list[bytes],
        vectors: list[str],
        *,
        ends_transaction: bool,  # noqa: ARG002 -- it never does
    ) -> Written:
        return super().complete(column, generation, keys, hashes, vectors, ends_transaction=False)

    def settle(self, column: Column, inflight: int, claim: Claim, result: BatchResult, token_limit: int) -> None:
        """Leaves a serializable transaction without a record: what is read for one could make it fail."""
        if self.value("select pg_catalog.current_setting('transaction_isolation')") != "serializable":
            super().settle(column, inflight, claim, result, token_limit)


class Subtransactions(Transactions):
    """What is refused is undone alone, and the statement goes on."""

    def __init__(self, plpy: Any, database: SessionDatabase) -> None:
        super().__init__(database)
        self.plpy = plpy

    def in_transaction(
        self,
        transaction: Callable[[], T],
        retract: Callable[[], None] | None = None,  # noqa: ARG002 -- nothing outlives a subtransaction
    ) -> T:
        with self.plpy.subtransaction():
            return transaction()


class Immediate:
    """The columns whose rows this session is embedding right now, and how it does."""

    def __init__(self, plpy: Any, models: LoadedModels) -> None:
        self.plpy = plpy
        self.database = StatementDatabase(plpy)
        self.models = models
        self.at_work: set[int] = set()

    def most_new_rows(self, registration: int, label: str) -> int | None:
        """Returns how many new rows of a statement are embedded in one piece.

        None for the write of their vectors, which is an UPDATE too and calls this again: there is nothing to do.
        """
        if registration in self.at_work:
            return None
        try:
            return settings.read().immediate_rows
        except AutoembedError as error:
            self.plpy.warning(f"{label}: new rows stay pending: {error}", hint=error.hint)
            return None

    def embed_new(
        self, relation: int, target: str, keys: list[str], contents: list[str], hashes: list[bytes]
    ) -> Answer:
        """Embeds a piece of a statement's new rows. What a model or a missing right prevents stays pending."""
        plan = self.database.immediate(relation, target)
        if plan is None:
            return Answer(pending=0, is_over=True)
        self.at_work.add(plan["registration"])
        try:
            claim = Claim(plan["generation"], keys, contents, hashes, 0)
            return answer_of(claim, self.encode_and_write(column_of(plan), claim))
        except AutoembedError as error:
            return Answer(pending=len(keys), reason=str(error), hint=error.hint, is_over=True)
        except self.database.error as error:
            state = self.database.sqlstate(error)
            if state.startswith(("57", "40", "25")):
                raise
            if state == OUT_OF_MEMORY:
                self.models.free_memory()
            return Answer(pending=len(keys), reason=f"their write ended with SQLSTATE {state}", is_over=True)
        except Exception as error:  # noqa: BLE001 -- a cancel is a SPIError, and went its way above
            return Answer(pending=len(keys), reason=f"{type(error).__name__} in the encoder", is_over=True)
        finally:
            self.at_work.remove(plan["registration"])

    def encode_and_write(self, column: Column, claim: Claim) -> BatchResult:
        encoder = encoder_of(column, self.models)
        result = BatchResult()
        started = time.monotonic()
        prompt = encoder.model.prompts["document"]
        checkpoint = self.database.check_encoding
        outcomes = batching.encode_all(encoder, claim.contents, prompt=prompt, checkpoint=checkpoint)
        result.encode_seconds = time.monotonic() - started
        self.models.count(column.model, len(claim.keys))
        transactions = Subtransactions(self.plpy, self.database)
        at_once = Experience(rows=max(1, len(claim.keys)))
        limit = encoder.model.max_tokens
        Writer(self.database, transactions, column, NOT_IN_FLIGHT, claim, limit, result, at_once).write(outcomes)
        return result


def answer_of(claim: Claim, result: BatchResult) -> Answer:
    """Says how many of the rows stay pending, and why; never a row's own words."""
    pending = len(claim.keys) - len(result.written)
    if not pending:
        return Answer(pending=0, is_over=False)
    reasons = list(dict.fromkeys(failed.message for failed in result.failed))
    if len(result.failed) < pending:
        reasons.append("a trigger of the table has changed the text meanwhile")
    return Answer(pending=pending, reason="; ".join(reasons[:REASONS]), is_over=False)
