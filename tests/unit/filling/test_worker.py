"""The worker's loop, with a database that only answers, and shorter times than a server's."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest

from autoembed.errors import AutoembedError, UnknownModel
from autoembed.filling import worker
from autoembed.filling.records import Column, Limits, Totals
from autoembed.filling.worker import Worker


class Answers:
    """Columns by their number of pending rows; nothing is ever in anybody's way."""

    error: type[Exception] = ZeroDivisionError

    def __init__(self, **pending: int) -> None:
        self.pending = pending
        self.newer = False  # do new rows come all the time?

    def columns(self, oid: int | None) -> list[Column]:  # noqa: ARG002
        return [Column(n, label, "model", "fingerprint", 3, "") for n, label in enumerate(self.pending)]

    def declarations(self) -> str:
        return ",".join(self.pending)

    def has_pending(self, column: Column, beyond: str | None) -> bool:
        return (beyond is None or self.newer) and self.pending[column.label] > 0

    def snapshot(self) -> str:
        return "now"

    def sqlstate(self, error: Exception) -> str:
        return str(error)

    def check_interrupts(self) -> None:
        pass

    commit = rollback = check_interrupts


class Clock:
    """Time goes on as the worker sleeps, and a little at each look at it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        self.now += 0.001
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


Fill = Callable[[Column, Totals, Limits], None]


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(worker, "time", clock)
    return clock


def work(database: Answers, fill: Fill, clock: Clock, seconds: int = 1) -> list[str]:
    """Which columns were filled, in that order; a warning of one is '!' before its name."""
    turns: list[str] = []

    def fill_one(column: Column, totals: Totals, limits: Limits) -> None:
        turns.append(column.label)
        fill(column, totals, limits)

    def warn(column: Column, error: AutoembedError) -> None:
        turns.append(f"!{column.label}")

    Worker(database, fill_one, lambda: None, warn, Totals(), seconds, clock.monotonic()).run()
    return turns


def test_each_column_has_its_turn(clock: Clock) -> None:
    """One that never ends keeps no other waiting."""
    limits_seen: list[int | None] = []

    def fill(column: Column, totals: Totals, limits: Limits) -> None:
        limits_seen.append(limits.seconds)
        totals.embedded += 1

    turns = work(Answers(large=10**9, small=10**9), fill, clock)
    assert turns[:4] == ["large", "small", "large", "small"]
    assert set(limits_seen) == {1}
    assert worker.TURN_SECONDS <= 10


def test_each_column_is_filled_now_and_then_without_a_look(clock: Clock) -> None:
    """That tidies, and finds what a dead worker left behind."""
    turns = work(Answers(idle=0), lambda *_: None, clock, seconds=330)
    assert len(turns) == 6
    assert work(Answers(idle=0), lambda *_: None, clock, seconds=50) == ["idle"]


def test_model_in_trouble_rests_and_is_told_of_once(clock: Clock) -> None:
    def fill(column: Column, totals: Totals, limits: Limits) -> None:
        raise UnknownModel(name="gone", directory="here")

    database = Answers(bad=1)
    database.newer = True
    assert work(database, fill, clock, seconds=20) == ["bad", "!bad"]
    turns = work(Answers(bad=1), fill, clock, seconds=100)
    assert turns.count("bad") == 4
    assert turns.count("!bad") == 1


def test_a_sleep_sees_a_cancel_soon(clock: Clock) -> None:
    """Python does not see it by itself."""
    database = Answers()
    looks: list[float] = []
    database.check_interrupts = lambda: looks.append(clock.now)  # type: ignore[method-assign]
    worker.sleep(database, 1)
    pauses = [after - before for before, after in pairwise(looks)]
    assert len(looks) > 10
    assert max(pauses) <= 0.1
