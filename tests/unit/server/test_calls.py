"""What a call leaves of a session's settings, whichever of its first statements a cancel hits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest

from autoembed.server.calls import AUTOCOMMIT_HINT, CannotCommit, committing
from autoembed.server.database import SessionDatabase


class Refused(Exception):
    """As PL/Python raises it."""

    def __init__(self, sqlstate: str) -> None:
        self.sqlstate = sqlstate


class Session:
    """A session's setting and its transaction; the step of that number ends with the error, done or not."""

    error: type[Exception] = Refused

    def __init__(self, failing: int = -1, sqlstate: str = "57014", *, is_done: bool = False) -> None:
        self.failing, self.sqlstate_raised, self.is_done = failing, sqlstate, is_done
        self.steps = 0
        self.committed = self.current = "serializable"

    def step(self) -> bool:
        """Tells whether this step fails."""
        self.steps += 1
        return self.steps == self.failing

    def trusted_value(self, query: str, _types: Sequence[str] = (), arguments: Sequence[Any] = ()) -> object:
        if self.step():
            raise Refused(self.sqlstate_raised)
        if "set_config" in query:
            self.current = str(arguments[0])
        return self.current if "current_setting" in query else False

    def commit(self) -> None:
        fails = self.step()
        if not fails or self.is_done:
            self.committed = self.current
        if fails:
            raise Refused(self.sqlstate_raised)

    def rollback(self) -> None:
        self.current = self.committed

    def sqlstate(self, error: Exception) -> str:
        return str(getattr(error, "sqlstate", ""))


def run(session: Session) -> None:
    with committing(cast("SessionDatabase", session), "embed_worker"):
        assert session.committed == "read committed"
        if session.step():
            raise Refused(session.sqlstate_raised)


@pytest.mark.parametrize("is_done", [False, True], ids=["undone", "done"])
@pytest.mark.parametrize("step", range(1, 8))
def test_cancel_at_any_step_leaves_the_isolation_as_it_was(step: int, is_done: bool) -> None:
    session = Session(step, is_done=is_done)
    if step < 6:
        with pytest.raises(Refused):
            run(session)
    else:  # as the isolation is restored: a cancel there must not undo it, nor end a call that is through
        run(session)
    assert (session.committed, session.current) == ("serializable", "serializable")


def test_inside_a_transaction_nothing_is_undone() -> None:
    session = Session(4, "2D000")
    with pytest.raises(CannotCommit) as caught:
        run(session)
    assert caught.value.hint == AUTOCOMMIT_HINT
    assert session.committed == "serializable"


def test_hint_names_each_common_driver() -> None:
    for driver in ("psycopg", "SQLAlchemy", "Django", "asyncpg", "node-postgres", "JDBC", "{call", "psql"):
        assert driver in AUTOCOMMIT_HINT
    assert len(AUTOCOMMIT_HINT) < 400
