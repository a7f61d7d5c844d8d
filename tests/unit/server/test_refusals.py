"""Whose words a user is told, by where an error comes from: in no case by the language that it speaks."""

from __future__ import annotations

from typing import Any

import pytest

from autoembed.server.database import SessionDatabase
from autoembed.server.refusals import WITHHELD, Answer, Refusal, said

GERMAN = "breche Anweisung wegen Benutzeraufforderung ab"
DETAIL, HINT = "Einzelheiten", "Tipp"


class SpiError(Exception):
    sqlstate: str
    spidata = (0, DETAIL, HINT, None, 0, None, None, None, None, None)


class Plpy:
    """A server that refuses every query."""

    SPIError = SpiError

    def __init__(self, sqlstate: str, message: str) -> None:
        self.raised = SpiError(message)
        self.raised.sqlstate = sqlstate

    def prepare(self, query: str, _types: list[str]) -> str:
        return query

    def execute(self, *_: Any) -> Any:
        raise self.raised


def told(plpy: Plpy, *, trusted: bool) -> Refusal:
    database = SessionDatabase(plpy)
    with pytest.raises(SpiError) as caught:
        database.check_interrupts() if trusted else database.execute("select 1")
    return said(database, caught.value)


def test_server_speaks_its_own_language() -> None:
    refusal = told(Plpy("57014", GERMAN), trusted=True)
    assert (str(refusal), refusal.sqlstate) == (GERMAN, "57014")
    assert (refusal.detail, refusal.hint) == (DETAIL, HINT)


@pytest.mark.parametrize("words", ["canceling statement due to a secret", "out of memory: a secret", GERMAN])
@pytest.mark.parametrize("sqlstate", ["57014", "53200", "40001", "42501", "P0001", "XX000"])
def test_tables_own_code_is_not_quoted(sqlstate: str, words: str) -> None:
    """A trigger can choose any SQLSTATE, and imitate any words."""
    refusal = told(Plpy(sqlstate, words), trusted=False)
    assert words not in str(refusal)
    assert refusal.sqlstate == sqlstate
    assert refusal.detail is None
    assert refusal.hint in (None, WITHHELD)


def test_answer_has_null_for_what_is_not_named() -> None:
    assert (Answer(vector="[1]")["vector"], Answer(vector="[1]")["refusal"]) == ("[1]", None)
    refused = Refusal("no", "22023").answer()
    assert [row["refusal"]["message"] for row in refused] == ["no"]
