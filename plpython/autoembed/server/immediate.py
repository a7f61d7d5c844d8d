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

    def embed_rows(self, relation: int, target: str) -> None:
        """Embeds a statement's new rows in one pass. What a model or a missing right prevents stays pending.

        The write of their vectors is an UPDATE itself and calls this again: then there is nothing to do.
        """
        plan = self.database.row("select * from autoembed.immediate($1, $2)", ["oid", "name"], [relation, target])
        if plan is None or plan["registration"] in self.at_work:
            return
        self.at_work.add(plan["registration"])
        try:
            self.embed_statement(plan)
        finally:
            self.at_work.remove(plan["registration"])

    def embed_statement(self, plan: Any) -> None:
        try:
            limit = settings.read().immediate_rows
            with self.plpy.subtransaction():
                rows = self.plpy.execute(plan["query"], limit + 1)
                if 0 < len(rows) <= limit:
                    self.embed_new(plan, rows)
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

    def reason(self, error: Exception) -> str:
        """Says what refused the vectors. Never the error's own message: a trigger's may quote the row."""
        constraint = self.database.constraint(error)
        refused = f": constraint {constraint} refused the vector" if constraint else ""
        return f"{refused} (SQLSTATE {self.database.sqlstate(error)})"

    def embed_new(self, plan: Any, rows: Sequence[Any]) -> None:
        column = column_of(plan)
        encoder = encoder_of(column, self.models)
        outcomes = batching.encode_all(
            encoder,
            [row["content"] for row in rows],
            prompt=encoder.model.prompts["document"],
            checkpoint=self.database.check_encoding,
        )
        self.models.count(column.model, len(rows))
        good = [
            (row, to_text(v.values)) for row, v in zip(rows, outcomes, strict=True) if isinstance(v, batching.Vector)
        ]
        self.database.complete(
            column,
            plan["generation"],
            [row["key"] for row, _ in good],
            [row["hash"] for row, _ in good],
            [text for _, text in good],
            ends_transaction=False,
        )
