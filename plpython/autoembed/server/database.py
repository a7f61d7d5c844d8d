"""The rows' side over plpy: each method is one function of the extension's SQL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from autoembed.filling.records import Candidates, Claim, Column, Frontier, Written
from autoembed.filling.sqlstates import OUT_OF_MEMORY

if TYPE_CHECKING:
    from autoembed.filling.records import BatchResult

EXTENSION_GONE = ("3F000", "42883", "42P01")
RELEASE = """
    select pg_catalog.pg_advisory_unlock(l), pg_catalog.pg_advisory_unlock_shared(l) from pg_catalog.unnest($1) l
"""
"""Where DROP EXTENSION has taken autoembed.release away; warns about locks that were not held, which it cannot know."""


class TrustedStep:
    """Marks what the server refuses meanwhile as its own words, or our SQL's: none of a table's own code is running."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        if error is not None:
            error.is_servers_own = True  # type: ignore[attr-defined]


TRUSTED = TrustedStep()


class SessionDatabase:
    """`FillDatabase` and `WorkerDatabase` over plpy. Plans are prepared once a session."""

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

    def trusted_value(self, query: str, types: Sequence[str] = (), arguments: Sequence[Any] = ()) -> Any:
        with TRUSTED:
            return self.value(query, types, arguments)

    def may_call(self, name: str) -> bool:
        return bool(self.trusted_value("select autoembed.may_call($1)", ["text"], [name]))

    def immediate(self, relation: int, target: str) -> Any:
        with TRUSTED:
            return self.row("select * from autoembed.immediate($1, $2)", ["oid", "name"], [relation, target])

    def visible_pids(self) -> set[int]:
        with TRUSTED:
            return {row["pid"] for row in self.execute("select autoembed.visible_pids() as pid")}

    def columns(self, oid: int | None) -> list[Column]:
        with TRUSTED:
            rows = self.execute("select * from autoembed.columns($1)", ["oid"], [oid])
        return [column_of(row) for row in rows]

    def declarations(self) -> str:
        return str(self.value("select autoembed.declarations()"))

    def has_pending(self, column: Column, beyond: str | None) -> bool:
        return bool(
            self.value(
                "select autoembed.has_pending($1::autoembed.column_sql, $2)",
                ["text", "text"],
                [column.column_sql, beyond],
            )
        )

    def snapshot(self) -> str:
        return str(self.value("select autoembed.snapshot()"))

    def candidates(self, column: Column, after: str | None, wanted: int) -> Candidates | None:
        row = self.row(
            "select * from autoembed.candidates($1::autoembed.column_sql, $2, $3)",
            ["text", "jsonb", "int4"],
            [column.column_sql, after, wanted],
        )
        return None if row is None else Candidates(**row)

    def next_suspect(self, column: Column, after: str | None) -> Candidates | None:
        row = self.row(
            "select * from autoembed.next_suspect($1::autoembed.column_sql, $2)",
            ["text", "jsonb"],
            [column.column_sql, after],
        )
        return None if row is None else Candidates([row["key"]], row["locks"], row["key"], 1, row["inflight"])

    def frontier(self, column: Column) -> Frontier | None:
        row = self.row("select * from autoembed.frontier($1::autoembed.column_sql)", ["text"], [column.column_sql])
        return None if row is None else Frontier(**row)

    def set_frontier(self, column: Column, key: str | None, last: str | None) -> None:
        self.execute(
            "select autoembed.set_frontier($1::autoembed.column_sql, $2, $3)",
            ["text", "jsonb", "jsonb"],
            [column.column_sql, key, last],
        )

    def claim(self, column: Column, candidates: Candidates, alone: bool) -> Claim | None:
        row = self.row(
            "select * from autoembed.claim($1::autoembed.column_sql, $2, $3, $4)",
            ["text", "int8", "jsonb[]", "bool"],
            [column.column_sql, candidates.inflight, candidates.keys, alone],
        )
        if row is None:
            return None
        return Claim(row["generation"], row["keys"], row["contents"], row["hashes"], row["lost"])

    def complete(
        self,
        column: Column,
        generation: int,
        keys: list[str],
        hashes: list[bytes],
        vectors: list[str],
        *,
        ends_transaction: bool,
    ) -> Written:
        row = self.row(
            "select * from autoembed.complete($1::autoembed.column_sql, $2, $3, $4, $5, $6)",
            ["text", "int8", "jsonb[]", "bytea[]", "text[]", "bool"],
            [column.column_sql, generation, keys, hashes, vectors, ends_transaction],
        )
        return Written(row["written"], row["refused"], row["left_hashes"])

    def settle(self, column: Column, inflight: int, claim: Claim, result: BatchResult, token_limit: int) -> None:
        from orjson import Fragment  # here: a call that finds nothing to do must not pay for the import

        failures = [
            {
                "key": Fragment(failed.key),
                "tried": failed.tried.hex(),
                "hash": failed.hash.hex(),
                "kind": failed.kind,
                "message": failed.message,
            }
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
        self.execute("select autoembed.tidy($1::autoembed.column_sql)", ["text"], [column.column_sql])

    def authorize(self, column: Column) -> None:
        with TRUSTED:
            self.execute("select autoembed.lock_column($1::autoembed.column_sql)", ["text"], [column.column_sql])

    def sqlstate(self, error: Exception) -> str:
        """Returns an error's; PL/Python has only the number of one that a trigger made up (elog.h: MAKE_SQLSTATE)."""
        known = getattr(error, "sqlstate", None)
        if known is not None:
            return str(known)
        details = getattr(error, "spidata", None)
        return "".join(chr((details[0] >> 6 * digit & 63) + 48) for digit in range(5)) if details else "XX000"

    def is_servers_own(self, error: Exception) -> bool:
        return getattr(error, "is_servers_own", False)

    def constraint(self, error: Exception) -> str | None:
        """Returns an error's, if there is one of that name: a trigger can name any (USING CONSTRAINT = ...)."""
        details = getattr(error, "spidata", None)
        name = details[-1] if details else None
        if name is None or not self.value("select autoembed.is_constraint($1)", ["text"], [name]):
            return None
        return str(name)

    def check_interrupts(self) -> None:
        with TRUSTED:
            self.plpy.execute("select 1")

    def check_encoding(self) -> None:
        """Lets a cancel through amid a pass, without a commit: as in `Filler.checkpoint`."""
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


def column_of(row: Any) -> Column:
    names = ("registration", "label", "model", "fingerprint", "dimensions", "column_sql")
    return Column(**{name: row[name] for name in names})


def json(value: Any) -> str:
    from orjson import dumps

    return dumps(value).decode()
