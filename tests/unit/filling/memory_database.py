# ruff: noqa: ARG002 -- the protocol's arguments
"""The rows' side in memory: one session's transactions and session-level locks, and faults at any of its steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256

from autoembed.filling.records import BatchResult, Candidates, Claim, Column, Frontier, Written
from autoembed.filling.sqlstates import OUT_OF_MEMORY, TOO_LARGE

FLIGHT = 10**6
"""Row locks are the rows' numbers, those of flights begin here."""


class Refused(Exception):
    """As PL/Python raises what the server refuses."""

    def __init__(self, sqlstate: str) -> None:
        super().__init__(sqlstate)
        self.sqlstate = sqlstate


def hash_of(text: str) -> bytes:
    return sha256(text.encode()).digest()


@dataclass(frozen=True)
class Row:
    text: str
    vector: str | None = None


@dataclass
class State:
    """All that a rollback takes back."""

    rows: dict[int, Row] = field(default_factory=dict)
    failures: dict[int, bytes] = field(default_factory=dict)
    inflight: dict[int, list[int]] = field(default_factory=dict)
    frontier: str | None = None

    def copy(self) -> State:
        return State(dict(self.rows), dict(self.failures), dict(self.inflight), self.frontier)


REVOKED = "revoked"
"""From here on the caller may not fill the table any more: all that asks for the right is refused."""
ROWS_OWN = ("23514", "P0001", "42501")
"""As a table's constraint, trigger and policy raise them, in a write."""


@dataclass(frozen=True)
class Fault:
    """What the call of this number, of any method or of one, ends with; `late`: after it has done its work.

    The calls count from the last fault that fired.
    """

    number: int
    method: str | None
    state: str  # an SQLSTATE, 'MemoryError' or REVOKED
    late: bool


@dataclass(frozen=True)
class Fired:
    method: str
    state: str


class MemoryDatabase:
    """`FillDatabase`. What a claim takes it keeps until it is released, whatever is rolled back."""

    error: type[Exception] = Refused

    def __init__(self) -> None:
        self.committed = State()
        self.state = self.committed.copy()
        self.is_open = False
        self.locks: Counter[int] = Counter()
        self.locked_by_others: set[int] = set()
        self.faults: list[Fault] = []
        self.fired: list[Fired] = []
        self.blamed: set[int] = set()
        """Rows that stood alone as their own trigger or constraint refused a write, or as memory ran out."""
        self.written_last: list[int] = []
        self.next_flight = 0
        self.calls = 0
        self.is_revoked = False

    def plan(self, faults: list[Fault]) -> None:
        self.faults, self.fired, self.calls, self.is_revoked = faults, [], 0, False

    # --- faults ------------------------------------------------------------------------------------------------

    @contextmanager
    def step(self, method: str) -> Iterator[None]:
        """Runs one call; where it fails, what it did to the rows is undone, and its locks stay."""
        fault = self.due(method)
        before = self.state.copy()
        if fault is not None and not fault.late:
            self.fire(method, fault.state)
        if self.is_revoked and method in ("candidates", "claim", "complete", "authorize"):
            raise Refused("42501")
        yield
        if fault is not None:
            self.state = before
            self.fire(method, fault.state)

    def due(self, method: str) -> Fault | None:
        if not self.faults or self.faults[0].method not in (None, method):
            return None
        if self.calls < self.faults[0].number:
            self.calls += 1
            return None
        self.calls = 0
        return self.faults.pop(0)

    def fire(self, method: str, state: str) -> None:
        if state == TOO_LARGE and method not in ("claim", "complete"):
            state = "XX000"  # nothing else passes texts or vectors
        if state in ROWS_OWN and method == "rollback":
            state = "XX000"  # no trigger runs there
        self.fired.append(Fired(method, state))
        if state == "MemoryError":
            raise MemoryError
        if state == REVOKED:
            self.is_revoked = True
            raise Refused("42501")
        if state in ROWS_OWN and len(self.written_last) == 1:
            self.blamed.update(self.written_last)
        raise Refused(state)

    @contextmanager
    def statement(self, method: str) -> Iterator[State]:
        self.is_open = True
        with self.step(method):
            yield self.state

    # --- transactions ------------------------------------------------------------------------------------------

    def commit(self) -> None:
        """What fails at the commit, a deferred constraint say, takes the transaction back."""
        try:
            with self.step("commit"):
                pass
        except (Refused, MemoryError):
            self.end(self.committed)
            raise
        self.end(self.state)

    def rollback(self) -> None:
        with self.step("rollback"):
            pass
        self.end(self.committed)

    def end(self, state: State) -> None:
        self.committed = state.copy()
        self.state = state.copy()
        self.is_open = False
        self.written_last = []

    def check_interrupts(self) -> None:
        with self.statement("check_interrupts"):
            pass

    def sqlstate(self, error: Exception) -> str:
        return str(getattr(error, "sqlstate", "XX000"))

    def constraint(self, error: Exception) -> str | None:
        return None

    # --- the protocol ------------------------------------------------------------------------------------------

    def is_due(self, state: State, key: int) -> bool:
        row = state.rows.get(key)
        return row is not None and row.vector is None and state.failures.get(key) != hash_of(row.text)

    def recover(self, column: Column) -> None:
        """A flight whose lock is free has lost its worker; with its twin there, nobody is blamed."""
        with self.statement("recover") as state:
            state.inflight = {n: keys for n, keys in state.inflight.items() if self.locks[FLIGHT + n]}

    def next_suspect(self, column: Column, after: str | None) -> Candidates | None:
        with self.statement("next_suspect"):
            return None

    def frontier(self, column: Column) -> Frontier | None:
        with self.statement("frontier") as state:
            return None if state.frontier is None else Frontier(state.frontier, held=True)

    def set_frontier(self, column: Column, key: str | None, last: str | None) -> None:
        with self.statement("set_frontier") as state:
            state.frontier = key

    def candidates(self, column: Column, after: str | None, wanted: int) -> Candidates | None:
        with self.statement("candidates") as state:
            pending = [key for key, row in sorted(state.rows.items()) if row.vector is None and key > int(after or -1)]
            passed = pending[:wanted]
            if not passed:
                return None
            keys = [key for key in passed if self.is_due(state, key)]
            self.next_flight += 1
            locks = [*keys, FLIGHT + self.next_flight]
            return Candidates([str(key) for key in keys], locks, str(passed[-1]), len(passed), self.next_flight)

    def claim(self, column: Column, candidates: Candidates, alone: bool) -> Claim:
        with self.statement("claim") as state:
            wanted = [int(key) for key in candidates.keys]
            mine = [key for key in wanted if key not in self.locked_by_others]
            self.locks.update([*mine, FLIGHT + candidates.inflight])
            keys = [key for key in mine if self.is_due(state, key)]
            self.locks.subtract(set(mine) - set(keys))
            if keys:
                state.inflight[candidates.inflight] = keys
            texts = [state.rows[key].text for key in keys]
            return Claim(
                1, [str(key) for key in keys], texts, [hash_of(text) for text in texts], len(wanted) - len(mine)
            )

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
        self.written_last = [int(key) for key in keys]
        with self.statement("complete") as state:
            written = []
            for key, text_hash, vector in zip(map(int, keys), hashes, vectors, strict=True):
                assert self.locks[key] == 1, f"row {key} is written without its lock"
                assert any(key in flight for flight in self.committed.inflight.values()), f"row {key} is not in flight"
                row = state.rows.get(key)
                if row is not None and row.vector is None and hash_of(row.text) == text_hash:
                    state.rows[key] = replace(row, vector=vector)
                    written.append(str(key))
            return Written(written, [], [])

    def settle(self, column: Column, inflight: int, claim: Claim, result: BatchResult, token_limit: int) -> None:
        short = [int(failed.key) for failed in result.failed if failed.kind == "memory"]
        assert not short or any(one.state in (OUT_OF_MEMORY, "MemoryError") for one in self.fired)
        with self.statement("settle") as state:
            self.blamed.update(short)
            state.inflight.pop(inflight, None)
            for key in map(int, result.written):
                state.failures.pop(key, None)
            state.failures.update({int(failed.key): failed.hash for failed in result.failed})

    def forget(self, column: Column, inflight: int) -> None:
        with self.statement("forget") as state:
            state.inflight.pop(inflight, None)

    def release(self, locks: list[int]) -> None:
        with self.statement("release"):
            self.locks.subtract({lock for lock in locks if self.locks[lock] > 0})

    def authorize(self, column: Column) -> None:
        with self.statement("authorize"):
            pass

    def tidy(self, column: Column) -> None:
        with self.statement("tidy"):
            pass

    def held(self) -> list[int]:
        return [lock for lock, count in self.locks.items() if count > 0]

    def forgive(self) -> None:
        """Forgets the failures of the rows that were blamed, as embed_retry does."""
        blamed, self.blamed = self.blamed, set()

        def forget(state: State) -> None:
            for key in blamed:
                state.failures.pop(key, None)

        self.change(forget)

    def change(self, change: Callable[[State], None]) -> None:
        """Another session's committed change."""
        assert not self.is_open
        change(self.committed)
        self.state = self.committed.copy()
