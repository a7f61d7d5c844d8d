"""Transactions that are tried again: where another one was in the way, where memory is short, where a cancel undoes."""

from __future__ import annotations

from collections.abc import Callable
from traceback import clear_frames
from typing import TYPE_CHECKING, TypeVar

from autoembed.filling.sqlstates import BUSY, CANCELED, OUT_OF_MEMORY

if TYPE_CHECKING:
    from autoembed.filling.database import Connection

ATTEMPTS = 5

T = TypeVar("T")


def nothing_to_free() -> bool:
    return False


class Transactions:
    """Runs each transaction on one connection.

    `free` gives back the memory that can be spared, and returns whether somebody had any: without, what the server
    lacks is not this call's to give, and nothing is tried again for it.
    """

    def __init__(self, connection: Connection, free: Callable[[], bool] = nothing_to_free) -> None:
        self.connection = connection
        self.free = free

    def in_transaction(self, transaction: Callable[[], T], retract: Callable[[], None] | None = None) -> T:
        """Runs it and commits; runs it again where another transaction was in the way, or where memory was freed.

        `retract` takes back what a failed try may have left beyond its rollback: session locks, which are counted.
        """
        for attempt in range(1, ATTEMPTS + 1):
            try:
                outcome = transaction()
                self.connection.commit()
                return outcome
            except (self.connection.error, MemoryError) as error:
                if attempt == ATTEMPTS or not self.may_retry(error):
                    raise
                self.connection.rollback()
                if retract is not None:
                    retract()
                    self.connection.commit()
        raise AssertionError("unreachable")

    def may_retry(self, error: Exception) -> bool:
        if self.is_out_of_memory(error):
            return self.free_memory(error)
        return self.connection.sqlstate(error) in BUSY

    def undo(self, step: Callable[[], None]) -> None:
        """Rolls back, then runs the step and commits it; again where an error hits just here, at most ATTEMPTS times.

        A second cancel would otherwise leave a lock or a setting behind in a pooled session, however many come.
        """
        attempts = 0
        while True:
            try:
                self.connection.rollback()
                step()
                self.connection.commit()
                return
            except (self.connection.error, MemoryError) as error:
                attempts += not self.is_cancel(error)
                if attempts == ATTEMPTS:
                    self.connection.rollback()
                    raise
                if self.is_out_of_memory(error):
                    self.free_memory(error)

    def is_cancel(self, error: BaseException) -> bool:
        return isinstance(error, self.connection.error) and self.connection.sqlstate(error) == CANCELED

    def is_out_of_memory(self, error: BaseException) -> bool:
        if isinstance(error, MemoryError):
            return True
        return isinstance(error, self.connection.error) and self.connection.sqlstate(error) == OUT_OF_MEMORY

    def free_memory(self, error: BaseException) -> bool:
        """Frees what the error's frames hold and what can be spared."""
        clear_frames(error.__traceback__)
        return self.free()
