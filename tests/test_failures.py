"""Rows that cannot be embedded: found among the good ones, held back, tried again, forgotten when they are gone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from psycopg import errors, sql

from autoembed.adding.add import add_model
from conftest import Database
from models_for_tests import nan_for, raises_for, zero_for
from support.rigging import Filling, Rig, Row, fill, leftovers, pending, rows, scalar
from support.server import Connection, Server, wait_until
from support.stubs import add_stub
from support.talk import DECLARING, notices, refusal

pytest_plugins = ["support.rig"]

Knowledge = Callable[..., str]
Connect = Callable[..., Connection]

SECRET = "xylophone"


@pytest.fixture
def server(rig: Rig) -> Server:
    return rig.server


def failures(connection: Connection) -> list[Row]:
    return rows(connection, "select key ->> 'id', kind, message, attempts from embedding_failures order by key")


def make_due(connection: Connection) -> None:
    connection.execute("update autoembed.failure set next_try = now() - interval '1 s' where next_try is not null")


def texts(count: int, *bad: int, word: str = "raiseword") -> list[str]:
    """The bad ones by their number, from 1 on, as their ids."""
    return [f"{SECRET} {word if n in bad else 'fine'} {n}" for n in range(1, count + 1)]


# --- what the encoder or the vector gate says ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "kind"), [("raiseword", "encoder"), ("nanword", "vector"), ("zeroword", "vector"), ("hugeword", "memory")]
)
def test_one_bad_among_31_good(db: Connection, declared: Knowledge, word: str, kind: str) -> None:
    declared(texts=texts(32, 17, word=word))
    assert fill(db) == (31, 1, 0)
    assert rows(db, "select id from knowledge where embedding is null") == [(17,)]
    ((key, found, message, attempts),) = failures(db)
    assert (key, found, attempts) == ("17", kind, 1)
    assert SECRET not in message
    assert word not in message
    assert fill(db) == (0, 0, 0)
    assert set(leftovers(db)) == {"failures"}


@pytest.mark.parametrize("word", ["raiseword", "nanword", "shortword"])
def test_all_32_bad(db: Connection, declared: Knowledge, word: str) -> None:
    declared(texts=texts(32, *range(1, 33), word=word))
    assert fill(db) == (0, 32, 0)
    assert pending(db) == 32
    assert len(failures(db)) == 32
    assert fill(db) == (0, 0, 0)


def test_vector_of_the_wrong_dimension_says_so(db: Connection, declared: Knowledge) -> None:
    declared(texts=["shortword"])
    assert fill(db) == (0, 1, 0)
    assert failures(db) == [("1", "vector", "the vector's shape is (383,), expected were 384 dimensions", 1)]


def test_bad_rows_among_many_batches(db: Connection, declared: Knowledge) -> None:
    bad = (1, 8, 9, 33, 64, 65, 100)
    declared(texts=texts(100, *bad))
    assert fill(db, batch=10) == (93, 7, 0)
    assert rows(db, "select id from knowledge where embedding is null order by id") == [(n,) for n in bad]


@pytest.mark.slow
def test_real_models_that_go_wrong_on_a_word(db: Connection, knowledge: Knowledge, rig: Rig, tmp_path: Path) -> None:
    wrong = {
        "raising": raises_for("galaxy", tmp_path),
        "turning_nan": nan_for("galaxy", tmp_path),
        "zeroing": zero_for("galaxy", tmp_path),
    }
    for kind, folder in wrong.items():
        size = 32 if kind == "zeroing" else 384
        add_model(folder, rig.models)
        knowledge(
            relation=kind, texts=[f"a {'galaxy' if n == 5 else 'text'} {n}" for n in range(1, 13)], dimensions=size
        )
        db.execute("select embed_column(%s::regclass, 'content'::name, model => %s::text)", [kind, folder.name])
        assert fill(db, relation=kind) == (11, 1, 0)
        assert rows(db, f"select id from {kind} where embedding is null") == [(5,)]
    found = rows(db, "select relation::text, key, kind, message from embedding_failures order by 1")
    assert [row[:3] for row in found] == [
        ("raising", {"id": 5}, "encoder"), ("turning_nan", {"id": 5}, "vector"), ("zeroing", {"id": 5}, "vector"),
    ]  # fmt: skip
    assert "the vector is zero" in found[2][3]


def test_encoder_that_fails_for_everything_blames_nobody(db: Connection, knowledge: Knowledge, rig: Rig) -> None:
    knowledge(10)
    if not (rig.models / "stub-broken").exists():
        add_stub(rig.models, "stub-broken")
    db.execute("select embed_column('knowledge', 'content'::name, model => 'stub-broken')")
    with pytest.raises(psycopg.Error, match="plain word") as caught:
        fill(db)
    assert caught.value.sqlstate == "58000"
    assert leftovers(db) == {}


# --- what the table refuses ------------------------------------------------------------------------------------

RAISE = """
create function refuse() returns trigger language plpgsql as $$
begin
    if new.id in (3, 17) and new.embedding is not null then
        raise exception using message = format('no vector for %L', new.content), errcode = '{}';
    end if;
    return new;
end $$;
"""


def refuse_by_trigger(db: Connection, state: str = "P0001", *, deferred: bool = False) -> None:
    db.execute(RAISE.format(state))
    kind = "constraint trigger refuse after" if deferred else "trigger refuse before"
    when = "deferrable initially deferred" if deferred else ""
    db.execute(f"create {kind} update on knowledge {when} for each row execute function refuse()")


def refuse_by_check(db: Connection) -> None:
    db.execute("alter table knowledge add constraint no_vector check (embedding is null or id not in (3, 17))")


def refuse_by_foreign_key(db: Connection, when: str = "") -> None:
    db.execute("create table topic (id int primary key)")
    db.execute(f"alter table knowledge add topic int constraint known_topic references topic {when}")
    db.execute(
        """create function set_topic() returns trigger language plpgsql as
           'begin if new.id in (3, 17) then new.topic := 0; end if; return new; end'"""
    )
    db.execute("create trigger set_topic before update on knowledge for each row execute function set_topic()")


@pytest.mark.parametrize(
    ("refuse", "words"),
    [
        (refuse_by_check, "constraint no_vector"),
        (refuse_by_trigger, "P0001"),
        (lambda db: refuse_by_trigger(db, "23514"), "23514"),
        (lambda db: refuse_by_trigger(db, "22012"), "22012"),
        (lambda db: refuse_by_trigger(db, "MY001"), "MY001"),
        (lambda db: refuse_by_trigger(db, deferred=True), "P0001"),
        (refuse_by_foreign_key, "constraint known_topic"),
        (lambda db: refuse_by_foreign_key(db, "deferrable initially deferred"), "constraint known_topic"),
    ],
    ids=[
        "check",
        "trigger",
        "trigger-23",
        "trigger-22",
        "trigger-own",
        "deferred-trigger",
        "foreign-key",
        "deferred-foreign-key",
    ],
)
def test_table_that_refuses_two_rows(
    db: Connection, declared: Knowledge, refuse: Callable[[Connection], None], words: str
) -> None:
    declared(texts=texts(32))
    refuse(db)
    assert fill(db) == (30, 2, 0)
    assert rows(db, "select id from knowledge where embedding is null order by id") == [(3,), (17,)]
    for key, kind, message, attempts in failures(db):
        assert (kind, attempts) == ("write", 1)
        assert key in ("3", "17")
        assert words in message
        assert SECRET not in message
    assert scalar(db, "select sum(embedded) from autoembed.run") == 30
    assert scalar(db, "select sum(failed) from autoembed.run") == 2
    assert set(leftovers(db)) == {"failures"}


CLEAR = "begin new.embedding := null; return new; end"
SWALLOW = "begin return null; end"
CLEAR_LATER = "begin update knowledge set embedding = null where id = new.id; return null; end"
CLEAR_SOME = """
begin
    if exists (select from knowledge where id = 3 and embedding is not null) then
        update knowledge set embedding = null where id = 3;
    end if;
    return null;
end
"""
ROW = "for each row when (new.id = 3 and new.embedding is not null)"


@pytest.mark.parametrize(
    ("body", "trigger"),
    [
        (CLEAR, f"trigger t before update on knowledge {ROW}"),
        (SWALLOW, f"trigger t before update on knowledge {ROW}"),
        (CLEAR_LATER, f"trigger t after update on knowledge {ROW}"),
        (CLEAR_LATER, f"constraint trigger t after update on knowledge deferrable initially deferred {ROW}"),
        (CLEAR_SOME, "trigger t after update on knowledge for each statement"),
    ],
    ids=["clears", "swallows", "clears-after", "clears-at-commit", "clears-after-statement"],
)
def test_trigger_that_keeps_a_vector_from_its_row(db: Connection, declared: Knowledge, body: str, trigger: str) -> None:
    """Counted as embedded, the row would be encoded again without end."""
    declared(texts=texts(10))
    db.execute(f"create function keep_out() returns trigger language plpgsql as $${body}$$")
    db.execute(f"create {trigger} execute function keep_out()")
    assert fill(db) == (9, 1, 0)
    assert failures(db) == [("3", "write", "a trigger of the table keeps the vector from being written", 1)]
    assert fill(db) == (0, 0, 0)
    assert scalar(db, "select next_try > now() + interval '20 s' from embedding_failures")
    assert set(leftovers(db)) == {"failures"}
    db.execute("drop trigger t on knowledge")
    make_due(db)
    assert fill(db) == (1, 0, 0)


def test_trigger_of_a_partition_that_keeps_a_vector_from_its_row(db: Connection) -> None:
    db.execute(
        "create table knowledge (id int, content text, embedding vector(384), primary key (id)) partition by list (id)"
    )
    db.execute("create table odd partition of knowledge for values in (1, 3)")
    db.execute("create table even partition of knowledge for values in (2, 4)")
    db.execute("select embed_column('knowledge', 'content'::name)")
    db.execute("insert into knowledge select g, 'text ' || g from generate_series(1, 4) g")
    db.execute(f"create function keep_out() returns trigger language plpgsql as $${CLEAR_LATER}$$")
    db.execute("create trigger t after update on odd for each row when (new.embedding is not null)"
               " execute function keep_out()")  # fmt: skip
    assert fill(db) == (2, 2, 0)
    assert [key for key, *_ in failures(db)] == ["1", "3"]


def test_trigger_that_makes_texts_uniform_costs_a_second_pass(db: Connection, declared: Knowledge) -> None:
    declared(texts=texts(10))
    db.execute("create function make_uniform() returns trigger language plpgsql"
               " as 'begin new.content := upper(new.content); return new; end'")  # fmt: skip
    db.execute("create trigger t before update on knowledge for each row execute function make_uniform()")
    assert fill(db) == (10, 0, 10)
    assert pending(db) == 0
    assert scalar(db, "select count(*) from knowledge where embedding is distinct from embed(content)") == 0
    assert leftovers(db) == {}


def test_trigger_that_changes_a_text_with_each_write(db: Connection, declared: Knowledge) -> None:
    declared(texts=texts(10))
    db.execute("create function lengthen() returns trigger language plpgsql"
               " as 'begin new.content := new.content || 1; return new; end'")  # fmt: skip
    db.execute("create trigger t before update on knowledge for each row when (new.id = 3) execute function lengthen()")
    assert fill(db) == (9, 1, 1)
    assert failures(db) == [("3", "write", "a trigger of the table changes the text with each write", 1)]
    assert fill(db) == (0, 0, 0)
    make_due(db)
    assert fill(db) == (0, 1, 1)
    assert [attempts for *_, attempts in failures(db)] == [2]
    assert set(leftovers(db)) == {"failures"}


def test_other_errors_of_a_trigger_end_the_columns_fill_and_blame_nobody(db: Connection, declared: Knowledge) -> None:
    """The owner's other columns are filled all the same, and by a worker too."""
    declared(texts=texts(32))
    refuse_by_trigger(db, "42883")
    db.execute("create table other (id int primary key, content text, embedding vector(384))")
    db.execute("select embed_column('other', 'content')")
    db.execute("insert into other values (1, 'one')")
    with pytest.raises(errors.UndefinedFunction, match=r"public\.knowledge\.embedding was not filled") as caught:
        fill(db)
    assert pending(db, "other") == 0
    db.execute("insert into other values (2, 'two')")
    with notices(db) as heard:
        db.execute("call embed_worker(max_seconds => 2)")
    assert [notice.severity for notice in heard] == ["WARNING"]
    assert "knowledge.embedding is not filled" in str(heard[0].message)
    assert pending(db, "other") == 0
    shown = [getattr(caught.value.diag, name) for name in dir(caught.value.diag) if not name.startswith("_")]
    assert SECRET not in str([*shown, heard])
    assert leftovers(db) == {}
    assert pending(db) == 32


def test_column_dropped_while_a_notice_is_due(db: Connection, connect: Connect, declared: Knowledge, rig: Rig) -> None:
    declared(texts=texts(4))
    rig.pace(1.2)
    filling = Filling(connect())
    wait_until(lambda: bool(rig.encodings()))
    db.execute("select embed_column_drop('knowledge')")
    assert filling.result == (0, 0, 4)
    assert leftovers(db) == {}


def test_state_of_a_triggers_own_leaves_a_new_row_pending(db: Connection, declared: Knowledge) -> None:
    declared(texts=texts(2))
    db.execute("select embed_column_set('knowledge', 'embedding', mode => 'immediate')")
    refuse_by_trigger(db, "MY001")
    with notices(db) as heard:
        db.execute("insert into knowledge (content) values ('three')")
    assert "1 of 1 new rows stays pending: " in str(heard[0].message)
    assert "MY001" in str(heard[0].message)
    assert pending(db) == 3


def test_text_without_a_vector_is_told_in_immediate_mode(db: Connection, declared: Knowledge) -> None:
    declared(texts=[])
    db.execute("delete from knowledge")
    db.execute("select embed_column_set('knowledge', 'embedding', mode => 'immediate')")
    with notices(db) as heard:
        db.execute("insert into knowledge (content) values ('one'), ('a nanword'), ('three')")
    assert [n.severity for n in heard] == ["WARNING"]
    assert "knowledge.embedding: 1 of 3 new rows stays pending: " in str(heard[0].message)
    assert pending(db) == 1
    assert rows(db, "select kind, attempts from embedding_failures") == [("vector", 1)]


def test_write_of_one_immediate_column_that_inserts_into_another(db: Connection, declared: Knowledge) -> None:
    declared(texts=texts(1))
    db.execute("create table copy (id int primary key, content text, embedding vector(384))")
    db.execute("select embed_column('copy', 'content', mode => 'immediate')")
    db.execute("select embed_column_set('knowledge', 'embedding', mode => 'immediate')")
    db.execute(
        """create function tell() returns trigger language plpgsql as
           $$begin insert into copy values (new.id, new.content); return null; end$$"""
    )
    db.execute("create trigger tell after update on knowledge for each row execute function tell()")
    db.execute("insert into knowledge (content) values ('new')")
    assert rows(db, "select id, embedding is not null from copy") == [(2, True)]


def test_refusal_of_one_column_leaves_the_other(db: Connection, declared: Knowledge) -> None:
    declared(texts=texts(5))
    db.execute("alter table knowledge add small vector(16) check (small is null or id <> 2)")
    db.execute("select embed_column('knowledge', 'content'::name, 'small', 'stub-16')")
    assert fill(db) == (9, 1, 0)
    assert rows(db, "select target::text, key from embedding_failures") == [("small", {"id": 2})]


# --- tried again -----------------------------------------------------------------------------------------------


def test_back_off_doubles_and_ends_after_five_tries(db: Connection, declared: Knowledge) -> None:
    declared(texts=texts(3, 2))
    waits: list[float | None] = []
    assert fill(db) == (2, 1, 0)
    for _ in range(5):
        waits.append(
            scalar(db, "select round(extract(epoch from next_try - last_try))::float8 from embedding_failures")
        )
        assert fill(db) == (0, 0, 0)
        make_due(db)
        fill(db)
    assert waits == [30, 60, 120, 240, None]
    assert rows(db, "select attempts, next_try from embedding_failures") == [(5, None)]
    assert fill(db) == (0, 0, 0)


def test_changed_text_is_tried_at_once(db: Connection, declared: Knowledge) -> None:
    declared(texts=texts(3, 1, 2))
    assert fill(db) == (1, 2, 0)
    db.execute("update knowledge set content = 'fine now' where id = 1")
    db.execute("update knowledge set content = 'raiseword still' where id = 2")
    assert fill(db) == (1, 1, 0)
    assert [(key, attempts) for key, _, _, attempts in failures(db)] == [("2", 1)]


def test_retry_tries_at_once(db: Connection, declared: Knowledge) -> None:
    declared(texts=texts(5, 1, 2))
    refused = "alter table knowledge add constraint no_vector check (embedding is null or id <> 4)"
    db.execute(refused)
    assert fill(db) == (2, 3, 0)
    db.execute("alter table knowledge drop constraint no_vector")
    assert fill(db) == (0, 0, 0)
    assert scalar(db, "select embed_retry('knowledge')") == 3
    assert fill(db) == (1, 2, 0)
    assert scalar(db, "select embed_retry()") == 2


def test_retry_is_for_declared_relations(db: Connection, knowledge: Knowledge) -> None:
    knowledge(1)
    error = refusal(db, "select embed_retry('knowledge')")
    assert error.sqlstate == "42704"
    assert error.diag.message_primary == "relation public.knowledge has no column declared for embedding"
    assert "embed_column" in str(error.diag.message_hint)
    assert scalar(db, "select embed_retry()") == 0


def test_success_clears_the_failure(db: Connection, declared: Knowledge) -> None:
    declared(texts=texts(3))
    refuse_by_trigger(db)
    assert fill(db) == (2, 1, 0)
    db.execute("drop trigger refuse on knowledge")
    make_due(db)
    assert fill(db) == (1, 0, 0)
    assert leftovers(db) == {}


def test_rows_in_back_off_keep_nobody_waiting(db: Connection, declared: Knowledge) -> None:
    declared(texts=texts(40, *range(1, 31)))
    assert fill(db, batch=8, max_rows=30) == (0, 30, 0)
    assert fill(db, batch=8) == (10, 0, 0)


def test_failures_of_rows_that_are_gone_are_purged(db: Connection, declared: Knowledge) -> None:
    declared(texts=[*texts(4, 1, 2, 3), "word " * 100])
    assert fill(db) == (2, 3, 0)
    db.execute("delete from knowledge where id in (1, 5)")
    db.execute("alter table knowledge alter id set generated by default")
    db.execute("update knowledge set id = 100 where id = 2")
    for table in ("failure", "truncation"):
        db.execute(f"update autoembed.{table} set checked = now() - interval '2 minutes'")
    fill(db)
    assert "3" in [key for key, *_ in failures(db)]
    assert {"1", "2"} & {key for key, *_ in failures(db)} == set()
    assert rows(db, "select * from embedding_truncations") == []


def test_max_rows_counts_failures(db: Connection, declared: Knowledge) -> None:
    declared(texts=texts(10, 1, 2, 3))
    assert fill(db, batch=2, max_rows=4) == (1, 3, 0)


# --- another transaction in the way ----------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["40001", "53200"])
def test_failure_that_passes_is_tried_again(db: Connection, declared: Knowledge, state: str) -> None:
    declared(texts=texts(20))
    db.execute("create sequence tries")
    db.execute(
        f"""create function lose() returns trigger language plpgsql as $$
           begin
               if nextval('tries') in (1, 5, 9) then raise exception 'lost' using errcode = '{state}'; end if;
               return new;
           end $$"""
    )
    db.execute("create trigger lose before update on knowledge for each row execute function lose()")
    assert fill(db) == (20, 0, 0)
    assert leftovers(db) == {}


def test_serialization_failure_without_end_blames_nobody(db: Connection, declared: Knowledge) -> None:
    declared(texts=texts(20))
    refuse_by_trigger(db, "40001")
    with pytest.raises(errors.SerializationFailure):
        fill(db)
    assert leftovers(db) == {}
    assert pending(db) == 20


def test_lock_timeout_is_tried_again(db: Connection, connect: Connect, declared: Knowledge) -> None:
    declared(texts=texts(5))
    blocker = connect(autocommit=False)
    blocker.execute("lock table knowledge in share mode")
    timer = threading.Timer(0.6, blocker.rollback)
    timer.start()
    db.execute("set lock_timeout = '200ms'")
    assert fill(db) == (5, 0, 0)
    timer.join()


def test_lock_timeout_without_end_blames_nobody(db: Connection, connect: Connect, declared: Knowledge) -> None:
    declared(texts=texts(5))
    blocker = connect(autocommit=False)
    blocker.execute("lock table knowledge in share mode")
    db.execute("set lock_timeout = '50ms'; set statement_timeout = '30s'")
    with pytest.raises(errors.LockNotAvailable):
        fill(db)
    blocker.rollback()
    assert leftovers(db) == {}
    assert fill(db) == (5, 0, 0)


def test_lock_timeout_while_a_suspect_flies_blames_nobody(
    db: Connection, connect: Connect, declared: Knowledge
) -> None:
    declared(texts=texts(5))
    other = connect()
    other.execute("select pg_advisory_lock(autoembed.solo_lock())")
    db.execute("set lock_timeout = '50ms'")
    with pytest.raises(errors.LockNotAvailable):
        fill(db)
    other.execute("select pg_advisory_unlock_all()")
    assert leftovers(db) == {}
    assert fill(db) == (5, 0, 0)


# --- row-level security ----------------------------------------------------------------------------------------

GRANTS = f"""
grant execute on procedure embed_pending to {{0}};
grant execute on function {DECLARING} to {{0}};
"""


def test_row_level_security_that_hides_and_refuses(
    db: Connection, database: Database, connect: Connect, role: Callable[..., str]
) -> None:
    alice = connect(role("fiona"))
    for grant in GRANTS.strip().splitlines():
        db.execute(sql.SQL(grant).format(sql.Identifier("fiona")))
    alice.execute("create table notes (id int primary key, content text, embedding vector(384))")
    alice.execute("insert into notes select g, 'text ' || g from generate_series(1, 10) g")
    alice.execute("select embed_column('notes', 'content'::name)")
    alice.execute("alter table notes enable row level security, force row level security")
    alice.execute("create policy reads on notes for select using (id <> 3)")
    alice.execute("create policy writes on notes for update using (true) with check (embedding is null or id <> 4)")
    assert fill(alice) == (8, 1, 0)
    assert rows(db, "select id from fiona.notes where embedding is null order by id") == [(3,), (4,)]
    ((key, kind, message, _),) = failures(alice)
    assert (key, kind) == ("4", "write")
    assert "row-level security" in message


def test_privilege_that_goes_during_the_call_is_nobodys_failure(
    db: Connection, connect: Connect, declared: Knowledge, role: Callable[..., str], rig: Rig
) -> None:
    declared(texts=texts(20))
    helper = connect(role("gordon"))
    db.execute(sql.SQL(GRANTS.strip().splitlines()[0]).format(sql.Identifier("gordon")))
    db.execute("grant select, update on knowledge to gordon")
    with rig.encoding(helper, relation="knowledge") as filling:
        db.execute("revoke update on knowledge from gordon")
    with pytest.raises(errors.InsufficientPrivilege):
        filling.result  # noqa: B018
    assert leftovers(db) == {}
