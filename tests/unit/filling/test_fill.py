"""What a batch leaves behind where memory runs out amid its cleaning up; the rest of fill.py is tested on a server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import pytest

from autoembed.encoding import batching
from autoembed.filling.database import FillDatabase
from autoembed.filling.fill import Filler
from autoembed.filling.records import Candidates, Claim, Column, Limits, Totals, Written
from autoembed.filling.write import Experience
from unit.fakes import FakeEncoder

COLUMN = Column(1, "public.docs.embedding", "stub", "f", 4, "")
FOUND = Candidates(["1"], [1, 2, 3], "1", 1, 7)


class Refused(Exception):
    """As PL/Python raises it."""

    def __init__(self, sqlstate: str) -> None:
        self.sqlstate = sqlstate


class Short:
    """A database side that has no memory for the calls named, so many times each."""

    error: type[Exception] = Refused

    def __init__(self, error: Exception, **times: int) -> None:
        self.raised = error
        self.times = times
        self.held: set[int] = set()
        self.largest = 512
        self.claimed: list[int] = []

    def step(self, name: str) -> None:
        if self.times.get(name, 0) > 0:
            self.times[name] -= 1
            raise self.raised

    def candidates(self, column: Column, after: str | None, wanted: int) -> Candidates | None:  # noqa: ARG002
        first = int(after or 0)
        keys = [str(key) for key in range(first + 1, min(first + wanted, 5) + 1)]
        return Candidates(keys, [1, 2, 3], keys[-1], 1, len(keys)) if keys else None

    def claim(self, column: Column, candidates: Candidates, alone: bool) -> Claim:  # noqa: ARG002
        self.held |= set(candidates.locks)
        if len(candidates.keys) > self.largest:
            raise Refused("54000")
        self.claimed.append(len(candidates.keys))
        return Claim(1, candidates.keys, [f"text {key}" for key in candidates.keys], [b"h"] * len(candidates.keys), 0)

    def complete(self, _column: Column, _generation: int, keys: list[str], *_: object, **_options: bool) -> Written:
        self.step("complete")
        return Written(keys, [], [])

    def forget(self, *_: object) -> None:
        self.step("forget")

    def release(self, locks: Sequence[int]) -> None:
        self.step("release")
        self.held -= set(locks)

    def check_interrupts(self) -> None:
        self.step("check_interrupts")

    def commit(self) -> None:
        self.step("commit")

    def rollback(self) -> None:
        pass

    def settle(self, *_: object) -> None:
        self.step("settle")

    def authorize(self, *_: object) -> None:
        pass

    def sqlstate(self, error: Exception) -> str:
        return str(getattr(error, "sqlstate", ""))


class Counting(FakeEncoder):
    freed = 0

    def free_memory(self) -> None:
        self.freed += 1


def filler(database: Short, encoder: FakeEncoder) -> Filler:
    return Filler(
        cast("FillDatabase", database), COLUMN, lambda: encoder, Totals(), Limits(), 1, progress=lambda *_: None
    )


ERRORS = [Refused("53200"), MemoryError()]


@pytest.mark.parametrize("error", ERRORS, ids=["server", "python"])
@pytest.mark.parametrize("step", ["forget", "release"])
def test_locks_are_given_back_without_memory(error: Exception, step: str) -> None:
    database, encoder = Short(error, complete=99, **{step: 3}), Counting()
    with pytest.raises(type(error)):
        filler(database, encoder).fill_batch(FOUND, alone=False)
    assert database.held == set()
    assert encoder.freed > 0


@pytest.mark.parametrize("error", ERRORS, ids=["server", "python"])
def test_locks_are_given_back_where_the_row_in_flight_stays(error: Exception) -> None:
    database = Short(error, complete=99, forget=99)
    with pytest.raises(type(error)):
        filler(database, Counting()).fill_batch(FOUND, alone=False)
    assert database.held == set()


@pytest.mark.parametrize("error", ERRORS, ids=["server", "python"])
def test_write_without_memory_is_tried_again(error: Exception) -> None:
    encoder = Counting()
    one = filler(Short(error, complete=1), encoder)
    assert one.fill_batch(FOUND, alone=False) == 0
    assert (one.totals.embedded, encoder.freed) == (1, 1)


@pytest.mark.parametrize("step", ["check_interrupts", "commit"])
def test_look_for_a_cancel_without_memory_means_the_pass(step: str) -> None:
    one = filler(Short(Refused("53200"), **{step: 1}), FakeEncoder())
    with pytest.raises(MemoryError):
        one.checkpoint()
    (outcome,) = one.encode(Counting(), ["one"])
    assert isinstance(outcome, batching.Vector)


def test_texts_too_large_together_are_claimed_in_smaller_batches() -> None:
    database = Short(Refused("54000"))
    database.largest = 2
    one = filler(database, FakeEncoder())
    one.batch = 5
    assert one.fill_once() == 0
    assert database.claimed == [2, 2, 1]
    assert (one.totals.embedded, database.held) == (5, set())


def test_transactions_are_as_large_as_their_rows_locks_are_short() -> None:
    experience = Experience()
    experience.learn(32, 0.320)
    assert experience.rows == 4
    for _ in range(20):
        experience.learn(experience.rows, experience.rows * 0.001)
    assert experience.rows in (39, 40)
    experience.learn(3, 0.030)
    assert experience.rows in (39, 40)
    experience.learn(8, 9.0)
    assert experience.rows == 1


def test_text_too_large_alone_ends_the_fill() -> None:
    database = Short(Refused("54000"))
    database.largest = 0
    with pytest.raises(Refused):
        filler(database, FakeEncoder()).fill_once()
    assert database.held == set()


@pytest.mark.parametrize("state", ["23505", "22P02", "P0001", "42501"])
def test_no_row_is_to_blame_where_the_record_is_refused(state: str) -> None:
    """A row's own constraint ends its write with the same SQLSTATE."""
    database = Short(Refused(state), settle=1)
    one = filler(database, FakeEncoder())
    with pytest.raises(Refused):
        one.fill_once()
    assert (one.totals.failed, database.claimed, database.held) == (0, [1], set())


def test_other_shortages_are_not_the_encoders() -> None:
    """Of locks, say: an encoder that is not loaded has nothing to give back, and nothing is tried again."""
    database = Short(Refused("53200"), commit=1)
    with pytest.raises(Refused):
        filler(database, FakeEncoder()).transactions.in_transaction(lambda: None)
