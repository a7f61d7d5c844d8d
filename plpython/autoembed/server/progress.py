"""What a call says of itself while it runs: notices to whoever waits for it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoembed.filling.records import Column, Totals
    from autoembed.server.database import SessionDatabase

FIRST_NOTICE, NOTICE_EVERY = 1.0, 5.0
COUNTED = 100_000
"""As far as autoembed.indexed_count counts."""


class Progress:
    """Sends a NOTICE when a person would wonder: after a second, then every five."""

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


def counted(rows: int) -> str:
    return "1 row" if rows == 1 else f"{rows} rows"


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
