"""A fault at any step of a fill leaves no lock, no row in flight, no row written twice, and no good row behind.

Rows come, change and go between the fills of a state machine; each fill may meet some faults, wherever they hit, amid
its cleaning up as well.
"""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from autoembed.encoding.vectors import to_text
from autoembed.errors import AutoembedError
from autoembed.filling.fill import Filler
from autoembed.filling.records import Column, Limits, Totals
from autoembed.filling.sqlstates import CANCELED, OUT_OF_MEMORY
from unit.fakes import FakeEncoder, vector_of
from unit.filling.memory_database import REVOKED, ROWS_OWN, Fault, Fired, MemoryDatabase, Refused, Row, State

COLUMN = Column(1, "public.docs.embedding", "fake", "f", 4, "")
BAD = "bad"
BUSY = ("40001", "40P01", "55P03")
STATES = (CANCELED, OUT_OF_MEMORY, "MemoryError", *BUSY, *ROWS_OWN, "25006", "54000", "08006", "XX000", REVOKED)
METHODS = ("claim", "complete", "settle", "commit", "rollback", "release", "forget", "check_interrupts", "candidates")
keys = st.integers(0, 7)
texts = st.sampled_from(["one", "two", "three", "four", BAD])
rows = st.dictionaries(keys, texts, min_size=3)
first = st.builds(Fault, st.integers(0, 3), st.sampled_from(METHODS), st.sampled_from(STATES), st.booleans())
later = st.builds(Fault, st.integers(0, 3), st.none(), st.sampled_from(STATES), st.booleans())
faults = st.tuples(first, st.lists(later, max_size=2)).map(lambda plan: [plan[0], *plan[1]])


class Fills(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.database = MemoryDatabase()
        self.encoder = FakeEncoder(self.encoding)

    def encoding(self, batch: Sequence[str]) -> None:
        """Is called before each pass."""
        assert not self.database.is_open, "a transaction is open while the encoder runs"
        if any(BAD in text for text in batch):
            raise ValueError

    @rule(written=rows)
    def write_rows(self, written: dict[int, str]) -> None:
        """A new text has no vector, as the row trigger sees to."""
        self.database.change(lambda state: state.rows.update({key: Row(text) for key, text in written.items()}))

    @rule(key=keys)
    def delete_row(self, key: int) -> None:
        def delete(state: State) -> None:
            state.rows.pop(key, None)
            state.failures.pop(key, None)

        self.database.change(delete)

    @rule(held=st.sets(keys, max_size=3))
    def others_hold_rows(self, held: set[int]) -> None:
        self.database.locked_by_others = held

    @rule(written=rows, batch=st.integers(1, 5), planned=faults, limit=st.none() | st.integers(1, 4))
    def fill_with_faults(self, written: dict[int, str], batch: int, planned: list[Fault], limit: int | None) -> None:
        self.write_rows(written)
        self.fill(batch, planned, limit)

    def fill(self, batch: int, planned: list[Fault], limit: int | None) -> None:
        database = self.database
        database.plan(planned)
        had = {key for key, row in database.committed.rows.items() if row.vector is not None}
        totals = Totals()
        try:
            Filler(database, COLUMN, lambda: self.encoder, totals, Limits(limit), batch, lambda *_: None).run()
        except (Refused, MemoryError, AutoembedError):
            assert database.fired, "an error out of nothing"
            fired = database.fired
            database.plan([])
            database.rollback()
        else:
            fired = database.fired
            database.plan([])
            has = {key for key, row in database.committed.rows.items() if row.vector is not None}
            assert totals.embedded == len(has - had)
        self.check_left(fired)

    def check_left(self, fired: list[Fired]) -> None:
        assert self.database.held() == [], fired
        assert self.database.committed.inflight == {}, fired

    @rule(batch=st.integers(1, 5))
    def fill_without_faults(self, batch: int) -> None:
        """Then no good row is left behind, whatever befell the fills before."""
        self.database.locked_by_others = set()
        self.database.forgive()
        self.fill(batch, [], None)
        assert self.database.committed.inflight == {}
        for key, row in self.database.committed.rows.items():
            assert (row.vector is None) == (row.text == BAD), f"row {key}: {row}"
            assert (key in self.database.committed.failures) == (row.text == BAD), f"row {key}: {row}"

    @invariant()
    def vectors_are_their_texts(self) -> None:
        for row in self.database.committed.rows.values():
            assert row.vector in (None, to_text(vector_of(row.text)))

    @invariant()
    def nobody_is_blamed_for_a_fault(self) -> None:
        for key in self.database.committed.failures.keys() - self.database.blamed:
            row = self.database.committed.rows.get(key)
            assert row is None or row.text == BAD or row.vector is not None or self.is_former(key), f"row {key}: {row}"

    def is_former(self, key: int) -> bool:
        """A failure of a text that the row has no more."""
        return self.database.is_due(self.database.committed, key)


Fills.TestCase.settings = settings(
    derandomize=True, database=None, deadline=None, max_examples=250, stateful_step_count=15
)
TestFills = Fills.TestCase
