"""What a user is told when a call is refused: words that quote no row, an SQLSTATE, a hint."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeVar

from autoembed.errors import AutoembedError
from autoembed.filling.sqlstates import OUT_OF_MEMORY, REFUSED

if TYPE_CHECKING:
    from autoembed.server.database import SessionDatabase

WORDED = re.compile(
    "(canceling statement due to |terminating connection|could not serialize access|deadlock detected"
    "|could not obtain lock|out of memory|out of shared memory|could not (extend|write|open|read|fsync) file"
    "|cannot execute |invalid transaction termination|permission denied (for|to fill) |a superuser does not fill "
    "|relation .* (has no column declared for embedding|has lost its primary key: its rows cannot be told apart)$)"
)
"""Beginnings of what the server itself and our own SQL say. Not the SQLSTATE: a table's trigger chooses its own."""
HIDDEN = "Its message is withheld, since it may quote a row: run the UPDATE of one row by hand to see it."
MEMORY_HINT = "What was committed stays. Free memory, use a smaller model, or lower EMBEDDING_MAX_SEQ_LENGTH."

P = ParamSpec("P")
R = TypeVar("R")


class Refusal(Exception):
    """Ends a call with these words."""

    def __init__(self, message: str, sqlstate: str, hint: str | None = None, detail: str | None = None) -> None:
        super().__init__(message)
        self.sqlstate, self.hint, self.detail = sqlstate, hint, detail


class Entered(Protocol):
    """What `interface` needs of the object whose methods SQL calls."""

    plpy: Any
    database: SessionDatabase


S = TypeVar("S", bound=Entered)


def interface(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Lets what a method raises reach the user as an error of PostgreSQL: with an SQLSTATE, a hint, and no row text."""

    @wraps(method)
    def call(self: S, /, *arguments: P.args, **options: P.kwargs) -> R:
        try:
            return method(self, *arguments, **options)
        except AutoembedError as error:
            refusal = Refusal(str(error), error.sqlstate, error.hint)
        except self.plpy.SPIError as error:
            refusal = worded(self.database, error)
        except Refusal as error:
            refusal = error
        except MemoryError:
            refusal = Refusal("out of memory", OUT_OF_MEMORY, MEMORY_HINT)
        raise raised(self.plpy, refusal) from None

    return call


def worded(database: SessionDatabase, error: Any) -> Refusal:
    """Returns the server's own words where they are known to quote no row: a trigger's, or a type's, may quote one."""
    detail, hint = error.spidata[1:3]
    state = database.sqlstate(error)
    if WORDED.match(str(error)):
        return Refusal(str(error), state, hint, detail if state == REFUSED else None)
    return Refusal(f"the call was ended by SQLSTATE {state}", state, HIDDEN)


def raised(plpy: Any, refusal: Refusal) -> Exception:
    """Returns the exception that PL/Python turns into an error of PostgreSQL.

    PL/Python prints an exception as "module.Class: message"; of a class that looks built in, without the module.
    """
    kind: Any = type("autoembed", (plpy.Error,), {"__module__": "builtins"})
    error: Exception = kind(str(refusal))
    error.sqlstate, error.hint, error.detail = refusal.sqlstate, refusal.hint, refusal.detail  # type: ignore[attr-defined]
    return error
