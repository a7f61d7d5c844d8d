"""What a user is told when a call is refused: words that quote no row, an SQLSTATE, a hint.

PL/Python hangs a traceback on whatever it raises. So a refusal is returned as data, and the function around the one in
Python raises it (sql/30_python.sql). What nobody foresaw is raised here, with its traceback.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeVar

from autoembed.errors import AutoembedError
from autoembed.filling.sqlstates import OUT_OF_MEMORY, REFUSED

if TYPE_CHECKING:
    from autoembed.server.database import SessionDatabase

WORDS = {
    "25006": "the transaction is read-only",
    "40001": "another transaction was in the way, and access could not be serialized",
    "40P01": "another transaction was in the way, and a deadlock was detected",
    "42501": "permission was denied by the table, or by one of its policies or triggers",
    "53100": "the disk is full",
    "53200": "out of memory",
    "55P03": "another transaction was in the way, and a lock could not be obtained in time",
    "57014": "the call was canceled, by request or by a timeout",
    "58030": "a file could not be read or written",
}
"""Where a table's own code may have spoken. A trigger can choose any SQLSTATE, so these are never its words."""
WITHHELD = "Its message is withheld, since it may quote a row: run the UPDATE of one row by hand to see it."
MEMORY_HINT = "What was committed stays. Free memory, use a smaller model, or lower EMBEDDING_MAX_SEQ_LENGTH."

P = ParamSpec("P")


class Answer(dict[str, Any]):
    """A function's OUT arguments by name; what is not named is null."""

    def __missing__(self, name: str) -> None:
        return None


class Refused(Answer):
    """The answer of a refused call: also a row, for a function that returns a set of them."""

    def __iter__(self) -> Iterator[Any]:
        yield self


class Refusal(Exception):
    """Ends a call with these words."""

    def __init__(self, message: str, sqlstate: str, hint: str | None = None, detail: str | None = None) -> None:
        super().__init__(message)
        self.sqlstate, self.hint, self.detail = sqlstate, hint, detail

    def answer(self) -> Refused:
        refusal = Answer(message=str(self), detail=self.detail, hint=self.hint, sqlstate=self.sqlstate)
        return Refused(refusal=refusal)


class Entered(Protocol):
    """What `interface` needs of the object whose methods SQL calls."""

    plpy: Any
    database: SessionDatabase


S = TypeVar("S", bound=Entered)
R = TypeVar("R")
Method = Callable[Concatenate[S, P], R]


def interface(method: Method[S, P, R]) -> Method[S, P, R | Refused]:
    """Returns what a method raises on purpose as data."""

    @wraps(method)
    def call(self: S, /, *arguments: P.args, **options: P.kwargs) -> R | Refused:
        try:
            return method(self, *arguments, **options)
        except Refusal as refusal:
            return refusal.answer()
        except AutoembedError as error:
            return worded(error).answer()
        except self.database.error as error:
            return said(self.database, error).answer()
        except MemoryError:
            return Refusal("out of memory", OUT_OF_MEMORY, MEMORY_HINT).answer()

    return call


def granted(method: Method[S, P, R]) -> Method[S, P, R | Refused]:
    """As `interface`, for what is not for everybody: the caller needs the right to call the function around it."""

    @interface
    @wraps(method)
    def call(self: S, /, *arguments: P.args, **options: P.kwargs) -> R:
        if not self.database.may_call(method.__name__):
            raise Refusal(f"permission denied for function {method.__name__}", REFUSED)
        return method(self, *arguments, **options)

    return call


def worded(error: AutoembedError) -> Refusal:
    return Refusal(str(error), error.sqlstate, error.hint)


def said(database: SessionDatabase, error: Exception) -> Refusal:
    """Returns the server's own words, in its own language, where none of a table's own code was running.

    There a trigger, a policy or a type ("invalid input syntax ...") may have spoken, and quote a row.
    """
    state = database.sqlstate(error)
    if database.is_servers_own(error):
        detail, hint = error.spidata[1:3]  # type: ignore[attr-defined]
        return Refusal(str(error), state, hint, detail)
    if state in WORDS:
        return Refusal(WORDS[state], state)
    return Refusal(f"the call was ended by SQLSTATE {state}", state, WITHHELD)


class Misfit:
    """Stands for the session where the extension's SQL and this package do not fit: refuses whatever it is called."""

    def __init__(self, plpy: Any, error: AutoembedError) -> None:
        self.plpy = plpy
        self.error = error

    def most_new_rows(self, *_: object) -> None:
        """Lets the statement of a writer succeed, as a model in trouble does."""
        self.plpy.warning(f"new rows stay pending: {self.error}", hint=self.error.hint)

    def __getattr__(self, name: str) -> Callable[..., Refused]:
        return lambda *_: worded(self.error).answer()
