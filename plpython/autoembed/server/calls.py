"""The procedures that commit as they go: one fill call, a worker that stays on, a wait."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from autoembed import settings
from autoembed.errors import AutoembedError, NotFilled, OtherDimensions, OtherModel
from autoembed.filling.fill import Filler
from autoembed.filling.records import Limits, Totals
from autoembed.filling.sqlstates import CALLS_OWN
from autoembed.filling.transactions import Transactions
from autoembed.filling.worker import LONGEST, SHORTEST, Worker, sleep
from autoembed.server.progress import Progress, counted
from autoembed.server.refusals import Answer, Refusal, said

if TYPE_CHECKING:
    from autoembed.encoding.protocol import Encoder
    from autoembed.filling.records import Column
    from autoembed.server.database import SessionDatabase
    from autoembed.server.loaded_models import LoadedModels

MAX_BATCH = 512
MAX_WORKERS = 64
AUTOCOMMIT_HINT = (
    "Call it outside BEGIN, alone in its query string, with autocommit. psycopg: autocommit=True. "
    'SQLAlchemy: isolation_level="AUTOCOMMIT". Django: outside atomic(). asyncpg: outside transaction(). '
    "node-postgres: no BEGIN before. JDBC: setAutoCommit(true), and CALL without the braces of {call ...}. "
    "psql: AUTOCOMMIT on, without --single-transaction."
)
"""The setting of each common driver: whoever reads this uses one of them."""


def batch_of(batch: int | None) -> int:
    """Returns the rows of a commit; null means the setting."""
    if batch is None:
        return settings.read().batch_size
    if not 1 <= batch <= MAX_BATCH:
        raise Refusal(f"batch is {batch}", "22023", f"batch is 1 to {MAX_BATCH}.")
    return batch


def check_limits(max_rows: int | None, max_seconds: int | None) -> None:
    for name, value in (("max_rows", max_rows), ("max_seconds", max_seconds)):
        if value is not None and value < 0:
            raise Refusal(f"{name} is {value}", "22023", f"{name} is 0 or more, or null for no limit.")


def check_workers(workers: int | None) -> int:
    if workers is None or not 1 <= workers <= MAX_WORKERS:
        raise Refusal(f"workers is {workers}", "22023", f"workers is 1 to {MAX_WORKERS}.")
    return workers


@contextmanager
def committing(database: SessionDatabase, procedure: str, when: str = "after each batch") -> Iterator[None]:
    """Commits bare before anything is claimed, and stays at read committed to the end."""
    if database.trusted_value("select pg_catalog.pg_is_in_recovery()"):
        raise Refusal(f"{procedure} cannot fill a standby", "25006", "Run it on the primary.")
    isolation = str(database.trusted_value("select pg_catalog.current_setting('default_transaction_isolation')"))
    if isolation == "read committed":
        commit_bare(database, procedure, when)
        yield
        return
    try:
        set_isolation(database, "read committed")
        commit_bare(database, procedure, when)
        yield
    except CannotCommit:
        raise  # the setting goes with the caller's transaction, which nobody but the caller ends
    except BaseException:
        restore_isolation(database, isolation)
        raise
    restore_isolation(database, isolation)


class CannotCommit(Refusal):
    """The call stands in a transaction of its caller's."""


def restore_isolation(database: SessionDatabase, level: str) -> None:
    """Restores it whatever ended the call: a pooled session would otherwise hand the other level to its next client."""
    Transactions(database).undo(partial(set_isolation, database, level))


def commit_bare(database: SessionDatabase, procedure: str, when: str) -> None:
    try:
        database.commit()
    except database.error as error:
        if database.sqlstate(error) != "2D000":
            raise
        raise CannotCommit(
            f"{procedure} commits {when} and cannot run inside a transaction block", "2D000", AUTOCOMMIT_HINT
        ) from None


def set_isolation(database: SessionDatabase, level: str) -> None:
    database.trusted_value(
        "select pg_catalog.set_config('default_transaction_isolation', $1, false)", ["text"], [level]
    )


def encoder_of(column: Column, models: LoadedModels) -> Encoder:
    """Returns the column's encoder, if its model is still the one that the column was declared with."""
    encoder = models.encoder(column.model)
    if encoder.model.fingerprint != column.fingerprint:
        raise OtherModel(name=column.model)
    if encoder.model.dimensions != column.dimensions:
        raise OtherDimensions(
            name=column.model, model=encoder.model.dimensions, label=column.label, column=column.dimensions
        )
    return encoder


class FillCall:
    """One call that fills, from its bare commit to its INOUT arguments."""

    def __init__(self, plpy: Any, database: SessionDatabase, models: LoadedModels, batch: int | None) -> None:
        self.plpy = plpy
        self.database = database
        self.models = models
        self.batch = batch_of(batch)
        self.totals = Totals()
        self.started = time.monotonic()
        self.counted = 0
        self.used = False
        self.encoders: dict[str, str] = {}
        """The models that this call encoded with, and their devices."""

    def fill_pending(self, relation: int | None, max_rows: int | None, max_seconds: int | None) -> Answer:
        check_limits(max_rows, max_seconds)
        with self.freeing_memory(), committing(self.database, "embed_pending"):
            self.fill_columns(relation, Limits(max_rows, max_seconds))
        return self.conclude()

    def stay(self, max_seconds: int | None, workers: int | None) -> Answer:
        check_limits(None, max_seconds)
        workers = check_workers(workers)
        with self.freeing_memory(), committing(self.database, "embed_worker"), self.place(workers) as is_free:
            if is_free:
                self.worker(max_seconds).run()
            else:
                self.plpy.notice("the embedding workers of this role are at work in this database already")
        return self.conclude()

    @contextmanager
    def freeing_memory(self) -> Iterator[None]:
        """Frees memory at the call's end, however it came: only one that encoded has some."""
        try:
            yield
        finally:
            if self.used:
                self.models.free_memory()

    @contextmanager
    def place(self, workers: int) -> Iterator[bool]:
        """Takes one of as many places, if one is free.

        In the end whichever of them this session holds is released: a cancel may have come as one was taken.
        """
        places = self.database.trusted_value("select autoembed.own_places($1)", ["int4"], [workers])
        try:
            place = self.database.trusted_value("select autoembed.take_place($1)", ["int8[]"], [places])
            places = places if place is None else [place]
            self.database.commit()
            yield place is not None
        finally:
            Transactions(self.database).undo(partial(self.database.release, places))

    def conclude(self) -> Answer:
        """Writes the call's line into the server's log, if it did anything; returns its INOUT arguments."""
        totals = self.totals
        if totals.embedded or totals.failed or totals.skipped:
            self.log(time.monotonic() - self.started)
        return Answer(embedded=totals.embedded, failed=totals.failed, skipped=totals.skipped, cached=0)

    def log(self, seconds: float) -> None:
        totals = self.totals
        encoders = ", ".join(f"{name} on {device}" for name, device in self.encoders.items())
        self.plpy.log(
            f"autoembed: {counted(totals.embedded)} embedded, {totals.failed} failed, {totals.skipped} skipped, "
            f"{totals.lost} left to other workers, {totals.truncated} truncated in {seconds:.1f} s "
            f"({totals.embedded / max(seconds, 1e-9):.1f} rows/s), {encoders}"
        )

    def fill_columns(self, oid: int | None, limits: Limits) -> None:
        columns = self.database.columns(oid)
        self.database.commit()
        if not columns:
            whose = "your own" if oid is None else "this relation"
            self.plpy.notice(
                f"nothing to fill: no column of {whose} is declared for embedding, enabled, and can be filled",
                hint="embedding_columns shows what is declared, and its status what a column lacks.",
            )
        report = Progress(self.plpy, self.database)
        trouble: list[tuple[Column, AutoembedError]] = []
        for column in columns:
            if not limits.room(self.totals, 1):
                break
            try:
                self.fill(column, limits, report)
            except AutoembedError as error:  # one column's trouble must not keep the others from being filled
                trouble.append((column, error))
        for column, problem in trouble[1:]:
            self.plpy.warning(f"{column.label} was not filled: {problem}", hint=problem.hint)
        for column, problem in trouble[:1]:
            raise Refusal(f"{column.label} was not filled: {problem}", problem.sqlstate, problem.hint)

    def fill(self, column: Column, limits: Limits, progress: Callable[[Column, Totals], None]) -> None:
        """Fills one column. What the table's own objects raise is its trouble, as is what its model lacks."""
        encoder = partial(self.encoder_of, column)

        def after_batch(column: Column, totals: Totals) -> None:
            self.count(column)
            progress(column, totals)

        try:
            Filler(self.database, column, encoder, self.totals, limits, self.batch, after_batch).run()
        except self.database.error as error:
            state = self.database.sqlstate(error)
            if state.startswith(CALLS_OWN):
                raise
            self.database.rollback()
            problem = self.problem(column, error)
            trouble = NotFilled(problem=problem, hint=problem.hint)
            trouble.sqlstate = problem.sqlstate
            raise trouble from None

    def problem(self, column: Column, error: Exception) -> Refusal:
        """Returns our own SQL's words where a right is gone, for a table's trigger may have said so as well."""
        try:
            self.database.authorize(column)
        except self.database.error as own:
            error = own
        self.database.rollback()
        return said(self.database, error)

    def count(self, column: Column) -> None:
        """Counts the model's texts since the last batch."""
        handled = self.totals.embedded + self.totals.failed + self.totals.skipped
        self.models.count(column.model, handled - self.counted)
        self.counted = handled

    def encoder_of(self, column: Column) -> Encoder:
        """Loads at the first row that needs it, so that a call with nothing pending costs no model."""
        self.used = True
        encoder = encoder_of(column, self.models)
        self.encoders[encoder.model.name] = encoder.device
        return encoder

    def worker(self, max_seconds: int | None) -> Worker:
        def fill(column: Column, _: Totals, limits: Limits) -> None:
            self.fill(column, limits, lambda *_: None)

        def warn(column: Column, error: AutoembedError) -> None:
            self.plpy.warning(f"{column.label} is not filled: {error}", hint=error.hint)

        return Worker(self.database, fill, self.models.free_memory, warn, self.totals, max_seconds)


def wait(
    database: SessionDatabase, relation: int | None, label: str | None, timeout: str | None, seconds: float | None
) -> None:
    """Returns once no row of the relation is pending or failing."""
    if relation is None or label is None or seconds is None:
        raise Refusal("relation and timeout must not be null", "22004")
    if seconds < 0:
        raise Refusal(f"timeout is {timeout}", "22023", "timeout is 0 or more.")
    with committing(database, "embed_wait", "between its looks"):
        wait_until(database, relation, label, time.monotonic() + seconds)


def wait_until(database: SessionDatabase, relation: int, label: str, end: float) -> None:
    """Looks again and again; asleep it holds no snapshot: what it waits for would be vacuumed in vain."""
    interval = SHORTEST
    while True:
        left = outstanding(database, relation)
        database.commit()
        if not left["pending"] and not left["failed"]:
            return
        if not left["pending"]:
            raise Refusal(
                f"rows of {label} could not be embedded and are not tried again: {left['failed']}",
                "55000",
                "embedding_failures says why; embed_retry lets them be tried again.",
            )
        if time.monotonic() >= end:
            why = database.value("select autoembed.why_left($1)", ["oid"], [relation])
            raise Refusal(
                f"rows of {label} are still pending{f': {why}' if why else ''}",
                "57014",
                "Is a worker at work (embed_worker, embed_schedule)? embedding_progress shows how far it is, "
                "embedding_failures why rows failed.",
            )
        sleep(database, min(interval, end - time.monotonic()))
        interval = min(2 * interval, LONGEST)


def outstanding(database: SessionDatabase, relation: int) -> Any:
    """Returns what is left of it. Our own SQL speaks first, where it refuses: a table's policy may have, as well."""
    try:
        return database.row("select * from autoembed.outstanding($1)", ["oid"], [relation])
    except database.error:
        database.rollback()
        database.columns(relation)
        raise
