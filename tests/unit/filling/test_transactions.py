"""What is tried again, and when it is given up; the faults of whole fills are in test_faults.py."""

from __future__ import annotations

import pytest

from autoembed.filling.transactions import ATTEMPTS, Transactions
from unit.filling.memory_database import MemoryDatabase, Refused


class Failing:
    """A step that fails so many times."""

    def __init__(self, sqlstate: str, times: int) -> None:
        self.sqlstate = sqlstate
        self.times = times
        self.calls = 0

    def __call__(self) -> None:
        self.calls += 1
        if self.calls <= self.times:
            raise Refused(self.sqlstate)


@pytest.mark.parametrize("sqlstate", ["57014", "25006", "XX000", "53200"])
def test_undoing_outlives_errors_that_pass(sqlstate: str) -> None:
    step = Failing(sqlstate, ATTEMPTS - 1)
    Transactions(MemoryDatabase()).undo(step)
    assert step.calls == ATTEMPTS


def test_undoing_outlives_any_number_of_cancels() -> None:
    step = Failing("57014", 3 * ATTEMPTS)
    Transactions(MemoryDatabase()).undo(step)
    assert step.calls == 3 * ATTEMPTS + 1


def test_undoing_what_cannot_be_undone_ends() -> None:
    step = Failing("25006", 99)
    with pytest.raises(Refused):
        Transactions(MemoryDatabase()).undo(step)
    assert step.calls == ATTEMPTS


def test_transaction_in_the_way_of_others_is_tried_again() -> None:
    step = Failing("40001", ATTEMPTS - 1)
    Transactions(MemoryDatabase()).in_transaction(step)
    assert step.calls == ATTEMPTS


@pytest.mark.parametrize("sqlstate", ["57014", "53200", "XX000"])
def test_other_errors_are_not_tried_again(sqlstate: str) -> None:
    """A cancel above all; and a lack of memory of which nobody has any to free."""
    step = Failing(sqlstate, 1)
    with pytest.raises(Refused):
        Transactions(MemoryDatabase()).in_transaction(step)
    assert step.calls == 1
