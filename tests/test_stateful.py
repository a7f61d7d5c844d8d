"""Random histories of a table: whatever is written, filled and renamed, no row carries another text's vector.

Hypothesis makes the histories, and shrinks one that ends badly to the steps that matter.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from psycopg import sql

from support.rigging import Rig, fill, leftovers
from support.server import Connection, Server

pytest_plugins = ["support.rig"]

Connect = Callable[..., Connection]
NAMES = count(1)
TEXTS = st.sampled_from([None, "", " ", "one", "two", "three", "One", "a raiseword", "x" * 300])
KEYS = st.integers(1, 4)
FOREIGN = """
    select id from {table}
    where case when {embedding} is not null
          then {embedding} <> embed(concat_ws(chr(10), title, {body}), 'stub-16', 'document') end
"""
UNFILLED = """
    select id from {table}
    where {embedding} is null and concat_ws(chr(10), title, {body}) ~ '[^[:space:]]'
      and concat_ws(chr(10), title, {body}) !~ 'raiseword'
"""


@pytest.fixture
def server(rig: Rig) -> Server:
    return rig.server


class History(RuleBasedStateMachine):
    """A table with two source columns; some of its texts cannot be embedded."""

    def __init__(self, db: Connection, worker: Connection, rig: Rig) -> None:
        super().__init__()
        self.db, self.worker, self.rig = db, worker, rig
        self.names = {"table": f"history{next(NAMES)}", "body": "body", "embedding": "embedding"}
        self.paused = self.declared = False

    def ask(self, query: str) -> list[tuple[object, ...]]:
        names = {name: sql.Identifier(value) for name, value in self.names.items()}
        return self.db.execute(sql.SQL(query).format(**names)).fetchall()

    def pending(self) -> bool:
        return not self.paused and self.declared and self.ask(UNFILLED) != []

    def run(self, statement: str, *arguments: object) -> None:
        names = {name: sql.Identifier(value) for name, value in self.names.items()}
        self.db.execute(sql.SQL(statement).format(**names), arguments or None)

    @initialize(mode=st.sampled_from(["deferred", "immediate"]))
    def declare(self, mode: str) -> None:
        self.rig.reset()
        self.run(
            "create table {table} (id int primary key, title text, {body} text, other int, {embedding} vector(16))"
        )
        self.run(
            "select embed_column(%s::text::regclass, array['title', 'body'], model => 'stub-16', mode => %s)",
            self.quoted(),
            mode,
        )
        for key, text in enumerate(("one", "two", "three"), 1):
            self.insert(key, None, text)
        fill(self.worker)
        self.declared = True

    def quoted(self) -> str:
        return sql.Identifier(self.names["table"]).as_string()

    def set_column(self, option: str, value: object) -> None:
        statement = f"select embed_column_set(%s::text::regclass, %s, {option})"
        self.run(statement, self.quoted(), self.names["embedding"], value)

    # --- writers ---

    @rule(key=KEYS, title=TEXTS, body=TEXTS)
    def insert(self, key: int, title: str | None, body: str | None) -> None:
        self.run("insert into {table} (id, title, {body}) values (%s, %s, %s) on conflict do nothing", key, title, body)

    @rule(key=KEYS, title=TEXTS, body=TEXTS)
    def upsert(self, key: int, title: str | None, body: str | None) -> None:
        self.run(
            """insert into {table} (id, title, {body}) values (%s, %s, %s)
               on conflict (id) do update set title = excluded.title, {body} = excluded.{body}""",
            key,
            title,
            body,
        )

    @rule(key=KEYS, body=TEXTS)
    def change_the_text(self, key: int, body: str | None) -> None:
        self.run("update {table} set {body} = %s where id = %s", body, key)

    @rule(key=KEYS)
    def change_another_column(self, key: int) -> None:
        self.run("update {table} set other = coalesce(other, 0) + 1 where id = %s", key)

    @rule(key=KEYS, body=TEXTS)
    def save_the_whole_row_as_it_was_read(self, key: int, body: str | None) -> None:
        """A mapper's way: the vector comes along, of the text that was."""
        self.run("update {table} set {body} = %s, {embedding} = {embedding} where id = %s", body, key)

    @rule(key=KEYS, other=KEYS)
    def take_the_vector_of_another_row(self, key: int, other: int) -> None:
        self.run(
            "update {table} t set {embedding} = o.{embedding} from {table} o where t.id = %s and o.id = %s", key, other
        )

    @rule(key=KEYS, other=KEYS)
    def swap_the_texts(self, key: int, other: int) -> None:
        self.run(
            "update {table} t set {body} = o.{body} from {table} o where (t.id, o.id) in ((%s, %s), (%s, %s))",
            key,
            other,
            other,
            key,
        )

    @rule(key=KEYS, to=st.integers(1, 12))
    def change_the_key(self, key: int, to: int) -> None:
        self.run(
            "update {table} set id = %s where id = %s and not exists (select from {table} where id = %s)", to, key, to
        )

    @rule(key=KEYS)
    def delete(self, key: int) -> None:
        self.run("delete from {table} where id = %s", key)

    @rule(key=KEYS, body=TEXTS)
    def change_and_roll_back(self, key: int, body: str | None) -> None:
        with self.db.transaction(force_rollback=True):
            self.run("update {table} set {body} = %s where id = %s", body, key)

    # --- fills ---

    @rule(batch=st.integers(1, 4), rows=st.none() | st.integers(1, 3))
    def fill(self, batch: int, rows: int | None) -> None:
        fill(self.worker, batch=batch, max_rows=rows)

    @precondition(lambda self: self.pending())
    @rule(key=KEYS, body=TEXTS, remove=st.booleans())
    def write_during_a_fill(self, key: int, body: str | None, remove: bool) -> None:
        with self.rig.encoding(self.worker):
            if remove:
                self.delete(key)
            else:
                self.change_the_text(key, body)

    # --- declarations ---

    @rule(mode=st.sampled_from(["deferred", "immediate"]))
    def change_the_mode(self, mode: str) -> None:
        self.set_column("mode => %s", mode)

    @rule()
    def pause_or_go_on(self) -> None:
        self.paused = not self.paused
        self.set_column("enabled => %s", not self.paused)

    @rule(what=st.sampled_from(["body", "embedding"]))
    def rename_a_column(self, what: str) -> None:
        name = f"{what} {next(NAMES)}"
        self.run(f"alter table {{table}} rename {{{what}}} to {sql.Identifier(name).as_string()}")
        self.names[what] = name

    @rule()
    def rename_the_table(self) -> None:
        name = f"Another {next(NAMES)}"
        self.run(f"alter table {{table}} rename to {sql.Identifier(name).as_string()}")
        self.names["table"] = name

    # --- what holds ---

    @precondition(lambda self: self.declared)
    @invariant()
    def no_row_carries_another_texts_vector(self) -> None:
        assert self.ask(FOREIGN) == []

    def teardown(self) -> None:
        """Nothing is left behind, and what can be filled is."""
        if self.paused:
            self.pause_or_go_on()
        fill(self.worker)
        assert self.ask(FOREIGN) == []
        assert self.ask(UNFILLED) == []
        assert leftovers(self.db).keys() <= {"failures"}
        self.run("drop table {table}")


def test_no_history_ends_with_another_texts_vector(
    db: Connection, connect: Callable[..., Connection], rig: Rig
) -> None:
    worker = connect()
    run_state_machine_as_test(
        lambda: History(db, worker, rig),  # type: ignore[arg-type]  # any factory will do
        settings=settings(
            max_examples=20,
            stateful_step_count=25,
            deadline=None,
            database=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
