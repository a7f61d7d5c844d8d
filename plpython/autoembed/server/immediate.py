"""Immediate mode: a statement's new rows are embedded as the statement ends. A model never fails the statement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from autoembed import settings
from autoembed.encoding import batching
from autoembed.encoding.vectors import to_text
from autoembed.errors import AutoembedError
from autoembed.filling.sqlstates import OUT_OF_MEMORY
from autoembed.server.calls import encoder_of
from autoembed.server.database import column_of

if TYPE_CHECKING:
    from autoembed.server.database import SessionDatabase
    from autoembed.server.loaded_models import LoadedModels


class Immediate:
    """The columns whose rows this session is embedding right now, and how it does."""

    def __init__(self, plpy: Any, database: SessionDatabase, models: LoadedModels) -> None:
        self.plpy = plpy
        self.database = database
        self.models = models
        self.at_work: set[int] = set()

    def most_new_rows(self, registration: int, label: str) -> int | None:
        """Returns how many new rows of a statement are embedded at most.

        None for the write of their vectors, which is an UPDATE too and calls this again: there is nothing to do.
        """
        if registration in self.at_work:
            return None
        try:
            return settings.read().immediate_rows
        except AutoembedError as error:
            self.plpy.warning(f"{label}: new rows stay pending: {error}", hint=error.hint)
            return None

    def embed_new(self, relation: int, target: str, keys: list[str], contents: list[str], hashes: list[bytes]) -> None:
        """Embeds a statement's new rows in one pass. What a model or a missing right prevents stays pending."""
        plan = self.database.immediate(relation, target)
        if plan is None:
            return
        self.at_work.add(plan["registration"])
        try:
            with self.plpy.subtransaction():
                self.encode_and_write(plan, keys, contents, hashes)
        except AutoembedError as error:
            self.plpy.warning(f"{plan['label']}: new rows stay pending: {error}", hint=error.hint)
        except self.database.error as error:
            state = self.database.sqlstate(error)
            if state.startswith(("57", "40", "25")):
                raise
            if state == OUT_OF_MEMORY:
                self.models.free_memory()
            self.plpy.warning(f"{plan['label']}: new rows stay pending{self.reason(error)}")
        except Exception as error:  # noqa: BLE001 -- a cancel is a SPIError, and went its way above
            self.plpy.warning(f"{plan['label']}: new rows stay pending: {type(error).__name__} in the encoder")
        finally:
            self.at_work.remove(plan["registration"])

    def reason(self, error: Exception) -> str:
        """Says what refused the vectors. Never the error's own message: a trigger's may quote the row."""
        constraint = self.database.constraint(error)
        refused = f": constraint {constraint} refused the vector" if constraint else ""
        return f"{refused} (SQLSTATE {self.database.sqlstate(error)})"

    def encode_and_write(
        self, plan: Any, keys: Sequence[str], contents: Sequence[str], hashes: Sequence[bytes]
    ) -> None:
        column = column_of(plan)
        encoder = encoder_of(column, self.models)
        prompt = encoder.model.prompts["document"]
        checkpoint = self.database.check_encoding
        outcomes = batching.encode_all(encoder, contents, prompt=prompt, checkpoint=checkpoint)
        self.models.count(column.model, len(contents))
        good = {row: each for row, each in enumerate(outcomes) if isinstance(each, batching.Vector)}
        self.database.complete(
            column,
            plan["generation"],
            [keys[row] for row in good],
            [hashes[row] for row in good],
            [to_text(vector.values) for vector in good.values()],
            ends_transaction=False,
        )
