"""A worker stays on: it fills what is pending, sleeps, and looks again.

Asleep it holds no snapshot, no transaction id and no lock but the one that counts its role's workers. Python does not
see a cancel by itself, so it sleeps in slices.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from autoembed.errors import AutoembedError
from autoembed.filling.database import Connection, WorkerDatabase
from autoembed.filling.records import Column, Limits, Totals
from autoembed.filling.sqlstates import BUSY, REFUSED

SLICE = 0.05
SHORTEST, LONGEST = 0.02, 0.4
"""Seconds between two looks. The interval doubles while nothing is pending: half of the longest is the usual delay of a
new row."""
TURN_SECONDS = 5
"""So long one column is filled before the next one has its turn."""
LOOK_SHARE = 10
"""A worker of many columns sleeps at least so many times as long as its look at all of them took."""
PAUSE_SHARE = 10
"""A column of which a turn embedded nothing (others hold its rows, say) pauses so many times as long as it took."""
SWEEP_SECONDS = 60.0
"""After so long each column is filled without a look: that tidies, and finds what a dead worker left behind."""
TROUBLE_SECONDS = 30.0
"""So long a column pauses whose model cannot be used, or whose table refuses."""


def sleep(database: Connection, seconds: float) -> None:
    """Sleeps, and lets a cancel through."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, SLICE))
        database.check_interrupts()
        database.commit()


@dataclass
class Turn:
    """A column's next turn: the column pauses until `pause_ends`; from `sweep_due` on it needs no look.

    While it pauses, only rows count that the snapshot `seen` of its last turn does not show; while it is in trouble,
    none does.
    """

    pause_ends: float = 0.0
    sweep_due: float = 0.0
    seen: str = ""
    trouble: str = ""


@dataclass
class Worker:
    """One call's loop. `fill` fills one column within limits; `free_memory` frees what only encoding needs."""

    database: WorkerDatabase
    fill: Callable[[Column, Totals, Limits], None]
    free_memory: Callable[[], None]
    warn: Callable[[Column, AutoembedError], None]
    totals: Totals
    seconds: int | None
    started: float = field(default_factory=time.monotonic)
    turns: dict[int, Turn] = field(default_factory=dict)
    columns: list[Column] = field(default_factory=list)
    known: str | None = None

    def run(self) -> None:
        interval, has_memory = SHORTEST, False
        while self.left() > 0:
            spent = self.handled()
            looking = self.look_around()
            if self.handled() > spent:
                interval, has_memory = SHORTEST, True
                continue
            if has_memory and interval >= LONGEST:
                self.free_memory()
                has_memory = False
            sleep(self.database, min(max(interval, LOOK_SHARE * looking), self.left()))
            interval = min(2 * interval, LONGEST)

    def left(self) -> float:
        """Returns the seconds that are left; a call without an end has an hour left at any time."""
        return 3600.0 if self.seconds is None else self.started + self.seconds - time.monotonic()

    def handled(self) -> int:
        return self.totals.embedded + self.totals.failed

    def look_around(self) -> float:
        """Looks at each column once, in the order of their last turns; returns the seconds that it did not fill."""
        began, filling = time.monotonic(), 0.0
        self.notice_declarations()
        for column in self.columns:
            if self.left() > 0 and self.wants(column):
                filling += self.take_turn(column)
        return time.monotonic() - began - filling

    def notice_declarations(self) -> None:
        declared = self.database.declarations()
        if declared != self.known:
            self.columns, self.known = self.database.columns(None), declared
            self.turns = {each.registration: self.turns.get(each.registration, Turn()) for each in self.columns}
        self.database.commit()

    def wants(self, column: Column) -> bool:
        turn, now = self.turns[column.registration], time.monotonic()
        pauses = now < turn.pause_ends
        if pauses and turn.trouble:
            return False
        try:
            found = self.database.has_pending(column, turn.seen if pauses else None)
            self.database.commit()
        except self.database.error as error:
            # a table that was given away a moment ago refuses: the next look at the declarations leaves it out
            if self.database.sqlstate(error) not in (*BUSY, REFUSED):
                raise
            self.database.rollback()
            return False
        return found or (now >= turn.sweep_due and not pauses)

    def take_turn(self, column: Column) -> float:
        """Fills the column for a while; returns the seconds that this took."""
        turn, before, began = self.turns[column.registration], self.handled(), time.monotonic()
        turn.seen = self.database.snapshot()
        self.database.commit()
        try:
            self.fill(column, self.totals, Limits(None, max(1, min(TURN_SECONDS, round(self.left())))))
            turn.trouble = ""
        except AutoembedError as error:  # one column's trouble must not keep the others from being filled
            if turn.trouble != str(error):
                self.warn(column, error)
            turn.trouble = str(error)
            turn.pause_ends = time.monotonic() + TROUBLE_SECONDS
            return time.monotonic() - began
        took = time.monotonic() - began
        turn.sweep_due = began + took + SWEEP_SECONDS
        if self.handled() == before:
            turn.pause_ends = began + took + PAUSE_SHARE * took
        return took
