"""The one module that meets PostgreSQL: it receives `plpy` and `GD`, and nothing else does.

`start` puts a `Session` into GD; the PL/Python bodies in sql/ call its methods. Models stand in GD, once per session.
Nothing about who may do what is kept here: GD survives SET ROLE.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar

from autoembed import API_VERSION, settings
from autoembed.encoding import batching
from autoembed.encoding.load import load_encoder
from autoembed.encoding.protocol import Encoder
from autoembed.encoding.vectors import to_text
from autoembed.errors import ApiMismatch, AutoembedError, NotFilled, OtherDimensions, OtherModel
from autoembed.filling.fill import (
    CANCELED,
    OUT_OF_MEMORY,
    REFUSED,
    Candidates,
    Claim,
    Column,
    Filler,
    Frontier,
    Limits,
    Round,
    Totals,
)
from autoembed.filling.worker import LONGEST, SHORTEST, Worker, sleep
from autoembed.models import directory
from autoembed.server import preloaded, status_file
from autoembed.server.loaded_models import Cache

MAX_BATCH = 512
MAX_WORKERS = 64
FIRST_NOTICE, NOTICE_EVERY = 1.0, 5.0
COUNTED = 100_000
"""As far as autoembed.indexed_count counts."""
WORDED = re.compile(
    "(canceling statement due to |terminating connection|could not serialize access|deadlock detected"
    "|could not obtain lock|out of memory|out of shared memory|could not (extend|write|open|read|fsync) file"
    "|cannot execute |invalid transaction termination|permission denied (for|to fill) |a superuser does not fill "
    "|relation .* (has no column declared for embedding|has lost its primary key: its rows cannot be told apart)$)"
)
"""Beginnings of what the server itself and our own SQL say. Not the SQLSTATE: a table's trigger chooses its own."""
HIDDEN = "Its message is withheld, since it may quote a row: run the UPDATE of one row by hand to see it."

CALLS_OWN = ("08", "25", "2D", "53", "57", "58", "XX")
"""Classes of SQLSTATEs that end a call; any other ends the fill of one column."""
EXTENSION_GONE = ("3F000", "42883", "42P01")
RELEASE = """
    select pg_catalog.pg_advisory_unlock(l), pg_catalog.pg_advisory_unlock_shared(l) from pg_catalog.unnest($1) l
"""
"""Where DROP EXTENSION has taken autoembed.release away; warns about locks that were not held, which it cannot know."""

P = ParamSpec("P")
R = TypeVar("R")


def start(plpy: Any, gd: dict[str, Any], api_version: int) -> None:
    """Put the session into GD; refuse where the extension's SQL and this package do not fit."""
    if api_version != API_VERSION:
        error = ApiMismatch(sql=api_version, package=API_VERSION)
        plpy.error(str(error), sqlstate=error.sqlstate, hint=error.hint)
    gd[f"autoembed {api_version}"] = Session(plpy, gd)


def interface(method: Callable[Concatenate[Session, P], R]) -> Callable[Concatenate[Session, P], R]:
    """What a method raises reaches the user as an error of PostgreSQL, with its SQLSTATE and a hint, and no row text.

    A message passes only where its words are the server's or ours: a trigger's, or a type's ("invalid input syntax …"),
    may quote a row.
    """

    @wraps(method)
    def call(self: Session, /, *arguments: P.args, **options: P.kwargs) -> R:
        try:
            return method(self, *arguments, **options)
        except AutoembedError as error:
            refusal = self.refusal(str(error), error.sqlstate, error.hint)
        except self.plpy.SPIError as error:
            refusal = self.worded(error)
        except self.error as error:
            refusal = error
        except MemoryError:
            hint = "What was committed stays. Free memory, use a smaller model, or lower EMBEDDING_MAX_SEQ_LENGTH."
            refusal = self.refusal("out of memory", OUT_OF_MEMORY, hint)
        raise refusal.with_traceback(None) from None  # PL/Python makes a CONTEXT of each frame

    return call


class Session:
    """The functions of the interface, as the PL/Python bodies call them."""

    def __init__(self, plpy: Any, gd: dict[str, Any]) -> None:
        self.plpy = plpy
        self.gd = gd
        self.models: Cache = gd.setdefault("autoembed models", Cache(status_file.Page()))
        # PL/Python prints an exception as "module.Class: message"; of a class that looks built in, without the module
        self.error: Any = type("autoembed", (plpy.Error,), {"__module__": "builtins"})
        self.database = SessionDatabase(plpy)
        self.embedding_rows: set[tuple[int, str]] = set()
        self.used = False

    # --- embedding ---------------------------------------------------------------------------------------------

    @interface
    def embed_one(self, content: str | None, model: str | None, prompt: str | None) -> str | None:
        return self.embed_many([content], model, prompt)[0]  # type: ignore[index]

    @interface
    def embed_many(
        self, contents: list[str | None] | None, model: str | None, prompt: str | None
    ) -> list[str | None] | None:
        if contents is None:
            return None
        if any(isinstance(text, list) for text in contents):
            self.fail("the array of texts has more than one dimension", "2202E", "Pass a one-dimensional array.")
        texts = [text for text in contents if text is not None]
        if not texts:
            return [None] * len(contents)
        encoder = self.encoder(model)
        outcomes = batching.encode_all(
            encoder, texts, prompt=self.prompt(encoder, prompt), checkpoint=self.database.check_encoding
        )
        places = [place for place, text in enumerate(contents, 1) if text is not None]
        vectors = iter([self.vector(outcome, place) for place, outcome in zip(places, outcomes, strict=True)])
        return [None if text is None else next(vectors) for text in contents]

    def vector(self, outcome: batching.Vector | batching.Failure, place: int) -> str:
        if isinstance(outcome, batching.Failure):
            state = OUT_OF_MEMORY if outcome.kind == "memory" else "38000"
            self.fail(f"text {place} could not be embedded: {outcome.message}", state, None)
        return to_text(outcome.values)

    def prompt(self, encoder: Encoder, name: str | None) -> str:
        known = encoder.model.prompts
        if name is None:
            name = encoder.model.default_prompt
            return known[name] if name else ""
        if name not in known:
            self.fail(
                f"model {encoder.model.name} has no prompt named {name}",
                "22023",
                f"Its prompts are: {', '.join(sorted(known))}.",
            )
        return known[name]

    def encoder(self, name: str | None) -> Encoder:
        """The loaded model of that name, loaded now if need be; again where its files have changed since."""
        current = settings.read()
        model = directory.find(current, name)
        return self.models.get(
            model, current, lambda: preloaded.take(self.gd, model, current), lambda: load_encoder(model, current)
        )

    @interface
    def embed_load(self, model: str | None) -> str:
        return self.encoder(model).model.name

    @interface
    def embed_unload(self) -> int:
        return self.models.clear()

    # --- filling -----------------------------------------------------------------------------------------------

    @interface
    def embed_pending(
        self, batch: int | None, relation: str | None, max_rows: int | None, max_seconds: int | None
    ) -> dict[str, int]:
        started = time.monotonic()
        batch = self.batch_of(batch)
        self.check_limits(max_rows, max_seconds)
        oid = None if relation is None else self.database.value("select autoembed.oid_of($1)", ["text"], [relation])
        isolation = self.enter()
        totals = Totals()
        try:
            self.fill_columns(batch, oid, totals, Limits(max_rows, max_seconds))
        finally:
            self.leave(isolation)
            self.rest()
        return self.conclude(totals, time.monotonic() - started)

    def rest(self) -> None:
        """At a call's end, however it came: only one that encoded has something to give back."""
        if self.used:
            self.models.rest()
            self.used = False

    def conclude(self, totals: Totals, seconds: float) -> dict[str, int]:
        """The call's line in the server's log, if it did anything, and its INOUT arguments."""
        if totals.embedded or totals.failed or totals.skipped:
            self.log(totals, seconds)
        return {"embedded": totals.embedded, "failed": totals.failed, "skipped": totals.skipped}

    def fill_columns(self, batch: int, oid: int | None, totals: Totals, limits: Limits) -> None:
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
            if not limits.room(totals, 1):
                break
            try:
                self.fill(column, totals, limits, batch, report)
            except AutoembedError as error:  # one column's trouble must not keep the others from being filled
                trouble.append((column, error))
        for column, problem in trouble[1:]:
            self.plpy.warning(f"{column.label} was not filled: {problem}", hint=problem.hint)
        for column, problem in trouble[:1]:
            self.fail(f"{column.label} was not filled: {problem}", problem.sqlstate, problem.hint)

    def fill(
        self, column: Column, totals: Totals, limits: Limits, batch: int, progress: Callable[[Column, Totals], None]
    ) -> None:
        """What the table's own objects raise is the column's trouble, as is what its model lacks."""
        try:
            Filler(self.database, column, self.encoder_of(column), totals, limits, batch, progress).run()
        except self.plpy.SPIError as error:
            state = self.database.sqlstate(error)
            if state.startswith(CALLS_OWN):
                raise
            self.database.rollback()
            worded = self.worded(error)
            trouble = NotFilled(problem=worded, hint=worded.hint)
            trouble.sqlstate = state
            raise trouble from None

    def encoder_of(self, column: Column) -> Callable[[], Encoder]:
        """Loads at the first row that needs it, so that a call with nothing pending costs no model."""

        def load() -> Encoder:
            self.used = True
            encoder = self.encoder(column.model)
            if encoder.model.fingerprint != column.fingerprint:
                raise OtherModel(name=column.model)
            if encoder.model.dimensions != column.dimensions:
                raise OtherDimensions(
                    name=column.model, model=encoder.model.dimensions, label=column.label, column=column.dimensions
                )
            return encoder

        return load

    def batch_of(self, batch: int | None) -> int:
        """Rows a commit; null means the setting."""
        if batch is None:
            return settings.read().batch_size
        if not 1 <= batch <= MAX_BATCH:
            self.fail(f"batch is {batch}", "22023", f"batch is 1 to {MAX_BATCH}.")
        return batch

    def check_limits(self, max_rows: int | None, max_seconds: int | None) -> None:
        for name, value in (("max_rows", max_rows), ("max_seconds", max_seconds)):
            if value is not None and value < 0:
                self.fail(f"{name} is {value}", "22023", f"{name} is 0 or more, or null for no limit.")

    def enter(self, procedure: str = "embed_pending", when: str = "after each batch") -> str | None:
        """Step 0: a bare commit, before anything is claimed; read committed from here on."""
        if self.database.value("select pg_catalog.pg_is_in_recovery()"):
            self.fail(f"{procedure} cannot fill a standby", "25006", "Run it on the primary.")
        isolation = str(self.database.value("select pg_catalog.current_setting('default_transaction_isolation')"))
        former = None if isolation == "read committed" else isolation
        if former is not None:
            self.set_isolation("read committed")
        try:
            self.database.commit()
        except self.plpy.SPIError as error:
            if self.database.sqlstate(error) != "2D000":
                raise
            self.fail(
                f"{procedure} commits {when} and cannot run inside a transaction block",
                "2D000",
                "Call it outside BEGIN, alone in its query string; psycopg needs autocommit=True.",
            )
        return former

    def leave(self, isolation: str | None) -> None:
        while isolation is not None:
            try:
                self.database.rollback()
                self.set_isolation(isolation)
                self.database.commit()
                return
            except self.plpy.SPIError as error:
                if self.database.sqlstate(error) != CANCELED:  # one that comes now must not leave the setting behind
                    raise

    def set_isolation(self, level: str) -> None:
        self.database.value(
            "select pg_catalog.set_config('default_transaction_isolation', $1, false)", ["text"], [level]
        )

    def log(self, totals: Totals, seconds: float) -> None:
        encoders = ", ".join(f"{name} on {loaded.device}" for name, loaded in self.models.loaded.items())
        self.plpy.log(
            f"autoembed: {counted(totals.embedded)} embedded, {totals.failed} failed, {totals.skipped} skipped, "
            f"{totals.lost} left to other workers, {totals.truncated} truncated in {seconds:.1f} s "
            f"({totals.embedded / max(seconds, 1e-9):.1f} rows/s), {encoders}"
        )

    # --- staying on --------------------------------------------------------------------------------------------

    @interface
    def embed_worker(self, batch: int | None, max_seconds: int | None, workers: int | None) -> dict[str, int]:
        started = time.monotonic()
        batch = self.batch_of(batch)
        self.check_limits(None, max_seconds)
        if workers is None or not 1 <= workers <= MAX_WORKERS:
            self.fail(f"workers is {workers}", "22023", f"workers is 1 to {MAX_WORKERS}.")
        isolation = self.enter("embed_worker")
        totals, places = Totals(), self.database.value("select autoembed.own_places($1)", ["int4"], [workers])
        try:
            place = self.database.value("select autoembed.take_place($1)", ["int8[]"], [places])
            places = places if place is None else [place]
            self.database.commit()
            if place is None:
                self.plpy.notice("the embedding workers of this role are at work in this database already")
            else:
                self.worker(batch, max_seconds, totals).run()
        finally:
            self.give_up(places)
            self.leave(isolation)
            self.rest()
        return self.conclude(totals, time.monotonic() - started)

    def worker(self, batch: int, max_seconds: int | None, totals: Totals) -> Worker:
        def fill(column: Column, totals: Totals, limits: Limits) -> None:
            self.fill(column, totals, limits, batch, lambda *_: None)

        def warn(column: Column, error: AutoembedError) -> None:
            self.plpy.warning(f"{column.label} is not filled: {error}", hint=error.hint)

        return Worker(self.database, fill, self.models.rest, warn, totals, max_seconds)

    def give_up(self, places: list[int]) -> None:
        """Whichever of them this session holds: a cancel may have come as one was taken."""
        while True:
            try:
                self.database.rollback()
                self.database.release(places)
                self.database.commit()
                return
            except self.plpy.SPIError as error:
                if self.database.sqlstate(error) != CANCELED:  # one that comes now must not leave the lock behind
                    raise

    @interface
    def embed_wait(self, relation: str | None, timeout: str | None) -> None:
        if relation is None or timeout is None:
            self.fail("relation and timeout must not be null", "22004", None)
        oid = self.database.value("select autoembed.oid_of($1)", ["text"], [relation])
        seconds = self.database.value("select autoembed.seconds($1)", ["text"], [timeout])
        if seconds < 0:
            self.fail(f"timeout is {timeout}", "22023", "timeout is 0 or more.")
        isolation = self.enter("embed_wait", "between its looks")
        try:
            self.wait(oid, relation, time.monotonic() + seconds)
        finally:
            self.leave(isolation)

    def wait(self, oid: int, relation: str, end: float) -> None:
        """Asleep it holds no snapshot: what it waits for would be vacuumed in vain."""
        interval = SHORTEST
        while True:
            left = self.database.row("select * from autoembed.outstanding($1)", ["oid"], [oid])
            self.database.commit()
            if not left["pending"] and not left["failed"]:
                return
            if not left["pending"]:
                self.fail(
                    f"rows of {relation} could not be embedded and are not tried again: {left['failed']}",
                    "55000",
                    "embedding_failures says why; embed_retry lets them be tried again.",
                )
            if time.monotonic() >= end:
                why = self.database.value("select autoembed.why_left($1)", ["oid"], [oid])
                self.fail(
                    f"rows of {relation} are still pending{f': {why}' if why else ''}",
                    "57014",
                    "Is a worker at work (embed_worker, embed_schedule)? embedding_progress shows how far it is, "
                    "embedding_failures why rows failed.",
                )
            sleep(self.database, min(interval, end - time.monotonic()))
            interval = min(2 * interval, LONGEST)

    # --- immediate mode ----------------------------------------------------------------------------------------

    @interface
    def embed_rows(self, relation: int, target: str) -> None:
        """A statement's new rows, in one pass. What a model or a missing right prevents stays pending.

        The write of their vectors is an UPDATE itself and calls this again: then there is nothing to do.
        """
        column = (relation, target)
        if column in self.embedding_rows:
            return
        self.embedding_rows.add(column)
        try:
            self.embed_statement(relation, target)
        finally:
            self.embedding_rows.remove(column)

    def embed_statement(self, relation: int, target: str) -> None:
        plan = self.database.row("select * from autoembed.immediate($1, $2)", ["oid", "name"], [relation, target])
        if plan is None:
            return
        try:
            limit = settings.read().immediate_rows
            with self.plpy.subtransaction():
                rows = self.plpy.execute(plan["query"], limit + 1)
                if 0 < len(rows) <= limit:
                    self.embed_new(plan, rows)
        except AutoembedError as error:
            self.plpy.warning(f"{plan['label']}: new rows stay pending: {error}", hint=error.hint)
        except self.plpy.SPIError as error:
            if self.database.sqlstate(error).startswith(("57", "40", "25")):
                raise
            if self.database.sqlstate(error) == OUT_OF_MEMORY:
                self.models.rest()
            self.plpy.warning(f"{plan['label']}: new rows stay pending{self.reason(error)}")
        except Exception as error:  # noqa: BLE001 -- a cancel is a SPIError, and went its way above
            self.plpy.warning(f"{plan['label']}: new rows stay pending: {type(error).__name__} in the encoder")

    def reason(self, error: Any) -> str:
        """Never the error's own message: a trigger's may quote the row."""
        constraint = self.database.constraint(error)
        refused = f": constraint {constraint} refused the vector" if constraint else ""
        return f"{refused} (SQLSTATE {self.database.sqlstate(error)})"

    def embed_new(self, plan: Any, rows: Sequence[Any]) -> None:
        column = column_of(plan)
        encoder = self.encoder_of(column)()
        outcomes = batching.encode_all(
            encoder,
            [row["content"] for row in rows],
            prompt=encoder.model.prompts["document"],
            checkpoint=self.database.check_encoding,
        )
        good = [
            (row, to_text(v.values)) for row, v in zip(rows, outcomes, strict=True) if isinstance(v, batching.Vector)
        ]
        self.database.complete(
            column,
            plan["generation"],
            [row["key"] for row, _ in good],
            [row["hash"] for row, _ in good],
            [text for _, text in good],
        )

    # --- what the views show -----------------------------------------------------------------------------------

    @interface
    def model(self, name: str | None) -> dict[str, Any]:
        found = directory.find(settings.read(), name)
        return {
            "name": found.name,
            "dimensions": found.dimensions,
            "max_tokens": found.max_tokens,
            "fingerprint": found.fingerprint,
        }

    @interface
    def list_models(self) -> list[dict[str, Any]]:
        return [
            {
                "name": entry.name,
                "status": entry.status,
                "dimensions": entry.dimensions,
                "max_tokens": entry.max_tokens,
                "architecture": entry.architecture,
                "precision": entry.precision,
                "fingerprint": entry.fingerprint,
                "bytes": entry.bytes,
                "note": entry.note,
            }
            for entry in directory.catalog(settings.read())
        ]

    @interface
    def list_sessions(self) -> list[dict[str, Any]]:
        """Those that the current user may look into, memory and all."""
        visible = {row["pid"] for row in self.database.execute("select autoembed.visible_pids() as pid")}
        found = []
        for pid, path in status_file.pages():
            if pid in visible:
                private, shared = status_file.memory_of(pid)
                about = {"pid": pid, "private_bytes": private, "shared_bytes": shared}
                found += [about | entry for entry in status_file.read(path)]
        return found

    @interface
    def health(self) -> list[tuple[str, str, str, str | None]]:
        from autoembed.server import health  # here: nobody else needs it

        checks = health.examine(self.gd)
        return [(name, check.status, check.message, check.hint) for name, check in checks.items()]

    def list_settings(self) -> list[tuple[str, str | None, str]]:
        return preloaded.annotate(self.gd, settings.report())

    # --- errors ------------------------------------------------------------------------------------------------

    def fail(self, message: str, sqlstate: str, hint: str | None) -> NoReturn:
        raise self.refusal(message, sqlstate, hint)

    def refusal(self, message: str, sqlstate: str, hint: str | None, detail: str | None = None) -> Any:
        error = self.error(message)
        error.sqlstate, error.hint, error.detail = sqlstate, hint, detail
        return error

    def worded(self, error: Any) -> Any:
        """The server's error, if its words are known to quote no row."""
        detail, hint = error.spidata[1:3]
        state = self.database.sqlstate(error)
        if WORDED.match(str(error)):
            return self.refusal(str(error), state, hint, detail if state == REFUSED else None)
        return self.refusal(f"the call was ended by SQLSTATE {state}", state, HIDDEN)


class Progress:
    """A NOTICE when a person would wonder: after a second, then every five."""

    def __init__(self, plpy: Any, database: SessionDatabase) -> None:
        self.plpy = plpy
        self.database = database
        self.started = time.monotonic()
        self.due = FIRST_NOTICE

    def __call__(self, column: Column, totals: Totals) -> None:
        seconds = time.monotonic() - self.started
        if seconds < self.due:
            return
        self.due = seconds + NOTICE_EVERY  # first: where counting fails, the fill goes on without a notice
        left = self.database.value("select autoembed.pending_count($1)", ["int8"], [column.registration])
        if left is None:  # the column was dropped meanwhile
            return
        rate = totals.embedded / seconds
        known = left <= COUNTED
        to_go = str(left) if known else f"more than {COUNTED}"
        message = f"{column.label}: {counted(totals.embedded)} embedded, {to_go} to go, {rate:.1f} rows/s"
        if known and rate > 0:
            message += f", {clock(left / rate)} left"
        if totals.failed:
            message += f", {totals.failed} failed"
        self.plpy.notice(message)


def column_of(row: Any) -> Column:
    names = ("registration", "label", "model", "fingerprint", "dimensions", "shape")
    return Column(**{name: row[name] for name in names})


def counted(rows: int) -> str:
    return "1 row" if rows == 1 else f"{rows} rows"


def json(value: Any) -> str:
    from orjson import dumps

    return dumps(value).decode()


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class SessionDatabase:
    """`fill.Database` over plpy. Plans are prepared once a session."""

    def __init__(self, plpy: Any) -> None:
        self.plpy = plpy
        self.error: type[Exception] = plpy.SPIError
        self.plans: dict[str, Any] = {}

    def execute(self, query: str, types: Sequence[str] = (), arguments: Sequence[Any] = ()) -> Any:
        plan = self.plans.get(query)
        if plan is None:
            plan = self.plans[query] = self.plpy.prepare(query, [f"pg_catalog.{name}" for name in types])
        return self.plpy.execute(plan, list(arguments))

    def row(self, query: str, types: Sequence[str] = (), arguments: Sequence[Any] = ()) -> Any:
        rows = self.execute(query, types, arguments)
        return rows[0] if len(rows) else None

    def value(self, query: str, types: Sequence[str] = (), arguments: Sequence[Any] = ()) -> Any:
        row = self.row(query, types, arguments)
        return next(iter(row.values()))

    def columns(self, oid: int | None) -> list[Column]:
        rows = self.execute("select * from autoembed.columns($1)", ["oid"], [oid])
        return [column_of(row) for row in rows]

    def declarations(self) -> str:
        return str(self.value("select autoembed.declarations()"))

    def has_pending(self, column: Column, beyond: str | None) -> bool:
        return bool(
            self.value(
                "select autoembed.has_pending($1::autoembed.shape, $2)", ["text", "text"], [column.shape, beyond]
            )
        )

    def snapshot(self) -> str:
        return str(self.value("select autoembed.snapshot()"))

    def candidates(self, column: Column, after: str | None, wanted: int) -> Candidates | None:
        row = self.row(
            "select * from autoembed.candidates($1::autoembed.shape, $2, $3)",
            ["text", "jsonb", "int4"],
            [column.shape, after, wanted],
        )
        return None if row is None else Candidates(**row)

    def next_suspect(self, column: Column, after: str | None) -> Candidates | None:
        row = self.row(
            "select * from autoembed.next_suspect($1::autoembed.shape, $2)", ["text", "jsonb"], [column.shape, after]
        )
        return None if row is None else Candidates([row["key"]], row["locks"], row["key"], 1, row["inflight"])

    def frontier(self, column: Column) -> Frontier | None:
        row = self.row("select * from autoembed.frontier($1::autoembed.shape)", ["text"], [column.shape])
        return None if row is None else Frontier(**row)

    def set_frontier(self, column: Column, key: str | None, last: str | None) -> None:
        self.execute(
            "select autoembed.set_frontier($1::autoembed.shape, $2, $3)",
            ["text", "jsonb", "jsonb"],
            [column.shape, key, last],
        )

    def claim(self, column: Column, candidates: Candidates, alone: bool) -> Claim | None:
        row = self.row(
            "select * from autoembed.claim($1::autoembed.shape, $2, $3, $4)",
            ["text", "int8", "jsonb[]", "bool"],
            [column.shape, candidates.inflight, candidates.keys, alone],
        )
        if row is None:
            return None
        return Claim(row["generation"], row["keys"], row["contents"], row["hashes"], row["lost"])

    def complete(
        self, column: Column, generation: int, keys: list[str], hashes: list[bytes], vectors: list[str]
    ) -> list[str]:
        written: list[str] = self.value(
            "select autoembed.complete($1::autoembed.shape, $2, $3, $4, $5)",
            ["text", "int8", "jsonb[]", "bytea[]", "text[]"],
            [column.shape, generation, keys, hashes, vectors],
        )
        return written

    def settle(self, column: Column, inflight: int, claim: Claim, result: Round, token_limit: int) -> None:
        from orjson import Fragment  # here: a call that finds nothing to do must not pay for the import

        failures = [
            {"key": Fragment(failed.key), "hash": failed.hash.hex(), "kind": failed.kind, "message": failed.message}
            for failed in result.failed
        ]
        truncations = [
            {"key": Fragment(key), "tokens": tokens, "limit": token_limit} for key, tokens in result.truncated
        ]
        figures = {
            "tokens": result.tokens,
            "claim": result.claim_seconds,
            "encode": result.encode_seconds,
            "write": result.write_seconds,
        }
        self.execute(
            "select autoembed.settle($1, $2, $3, $4, $5, $6, $7)",
            ["int8", "int8", "jsonb[]", "jsonb[]", "jsonb", "jsonb", "jsonb"],
            [column.registration, inflight, claim.keys, result.written, *map(json, (failures, truncations, figures))],
        )

    def forget(self, column: Column, inflight: int) -> None:
        try:
            self.execute("select autoembed.forget($1, $2)", ["int8", "int8"], [column.registration, inflight])
        except self.plpy.SPIError as error:
            if self.sqlstate(error) not in EXTENSION_GONE:
                raise

    def release(self, locks: list[int]) -> None:
        try:
            self.execute("select autoembed.release($1)", ["int8[]"], [locks])
        except self.plpy.SPIError as error:
            if self.sqlstate(error) not in EXTENSION_GONE:
                raise
            self.execute(RELEASE, ["int8[]"], [locks])

    def recover(self, column: Column) -> None:
        self.execute("select autoembed.recover($1)", ["int8"], [column.registration])

    def tidy(self, column: Column) -> None:
        self.execute("select autoembed.tidy($1::autoembed.shape)", ["text"], [column.shape])

    def authorize(self, column: Column) -> None:
        self.execute("select autoembed.enter($1::autoembed.shape)", ["text"], [column.shape])

    def sqlstate(self, error: Exception) -> str:
        """Of one that it does not know, a trigger's own, PL/Python has the number alone (elog.h: MAKE_SQLSTATE)."""
        known = getattr(error, "sqlstate", None)
        if known is not None:
            return str(known)
        details = getattr(error, "spidata", None)
        return "".join(chr((details[0] >> 6 * place & 63) + 48) for place in range(5)) if details else "XX000"

    def constraint(self, error: Exception) -> str | None:
        """Its constraint, where there is one of that name: a trigger can name anything (USING CONSTRAINT = …)."""
        details = getattr(error, "spidata", None)
        name = details[-1] if details else None
        if name is None or not self.value("select autoembed.is_constraint($1)", ["text"], [name]):
            return None
        return str(name)

    def check_interrupts(self) -> None:
        self.plpy.execute("select 1")

    def check_encoding(self) -> None:
        """The same amid a pass, without a commit: as in `Filler.checkpoint`."""
        try:
            self.check_interrupts()
        except self.plpy.SPIError as error:
            if self.sqlstate(error) != OUT_OF_MEMORY:
                raise
            raise MemoryError from None

    def commit(self) -> None:
        self.plpy.commit()

    def rollback(self) -> None:
        self.plpy.rollback()
