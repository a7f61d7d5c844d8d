"""A fill that stays on: fills what is pending, sleeps, looks again.

Asleep it holds no snapshot, no transaction id and no lock but its place. Python does not see a cancel by itself, so it
sleeps in slices.
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
"""Between two looks. The interval doubles while nothing is pending; half of the longest is a new row's usual delay."""
TURN = 5
"""Seconds that one column is filled before the next one has its turn."""
PROBING_SHARE = 10
"""A worker of many columns sleeps at least so many times as long as its look at all of them took."""
BARREN_SHARE = 10
"""A column of which a fill embedded nothing (rows that others hold, say) rests so many times as long as it took."""
ROUND = 60.0
"""Seconds after which each column is filled without a look: that tidies, and finds what a dead worker left behind."""
TROUBLE = 30.0
"""Seconds that a column rests whose model cannot be used, or whose table refuses."""


def sleep(database: Connection, seconds: float) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, SLICE))
        database.check_interrupts()
        database.commit()


@dataclass
class Place:
    """Until when a column rests, and when it is filled without a look.

    While it rests, only rows count that were not there yet when it was last filled, in the snapshot `seen`; while its
    model is in trouble, none does.
    """

    look: float = 0.0
    fill: float = 0.0
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
    places: dict[int, Place] = field(default_factory=dict)
    columns: list[Column] = field(default_factory=list)
    known: str | None = None

    def run(self) -> None:
        interval, tired = SHORTEST, False
        while self.left() > 0:
            spent = self.handled()
            looking = self.look_around()
            if self.handled() > spent:
                interval, tired = SHORTEST, True
                continue
            if tired and interval >= LONGEST:
                self.free_memory()
                tired = False
            sleep(self.database, min(max(interval, PROBING_SHARE * looking), self.left()))
            interval = min(2 * interval, LONGEST)

    def left(self) -> float:
        """Seconds; a call without an end has an hour left at any time."""
        return 3600.0 if self.seconds is None else self.started + self.seconds - time.monotonic()

    def handled(self) -> int:
        return self.totals.embedded + self.totals.failed

    def look_around(self) -> float:
        """At each column once, in the order of their last turns; the seconds that looking took, not filling."""
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
            self.places = {each.registration: self.places.get(each.registration, Place()) for each in self.columns}
        self.database.commit()

    def wants(self, column: Column) -> bool:
        place, now = self.places[column.registration], time.monotonic()
        rests = now < place.look
        if rests and place.trouble:
            return False
        try:
            found = self.database.has_pending(column, place.seen if rests else None)
            self.database.commit()
        except self.database.error as error:
            # a table that was given away a moment ago refuses: the next look at the declarations leaves it out
            if self.database.sqlstate(error) not in (*BUSY, REFUSED):
                raise
            self.database.rollback()
            return False
        return found or (now >= place.fill and not rests)

    def take_turn(self, column: Column) -> float:
        """Fill it for a while; the seconds that this took."""
        place, before, began = self.places[column.registration], self.handled(), time.monotonic()
        place.seen = self.database.snapshot()
        self.database.commit()
        try:
            self.fill(column, self.totals, Limits(None, max(1, min(TURN, round(self.left())))))
            place.trouble = ""
        except AutoembedError as error:  # one column's trouble must not keep the others from being filled
            if place.trouble != str(error):
                self.warn(column, error)
            place.trouble = str(error)
            place.look = time.monotonic() + TROUBLE
            return time.monotonic() - began
        took = time.monotonic() - began
        place.fill = began + took + ROUND
        if self.handled() == before:
            place.look = began + took + BARREN_SHARE * took
        return took
