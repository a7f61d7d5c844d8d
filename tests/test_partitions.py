"""Partitions that come and go: no row carries another text's vector, whoever holds it meanwhile."""

from __future__ import annotations

from pathlib import Path

import psycopg
import pytest

from support.server import Connection
from support.talk import TINY, VECTOR, column, notices, refusal, scalar

pytest_plugins = ["support.warm"]

COLUMNS = "(id int not null, content text, note text, embedding vector(32))"


@pytest.fixture
def docs(warm: Connection) -> Connection:
    """A declared table with two partitions, q partitioned itself; rows 1, 11 and 21 have vectors of ones."""
    warm.execute(f"create table docs {COLUMNS} partition by range (id)")
    warm.execute("alter table docs add primary key (id)")
    warm.execute("create table p partition of docs for values from (0) to (10)")
    warm.execute("create table q partition of docs for values from (10) to (30) partition by range (id)")
    warm.execute("create table q1 partition of q for values from (10) to (20)")
    warm.execute("create table q2 partition of q for values from (20) to (30)")
    warm.execute("select embed_column('docs', array['content', 'note'], model => %s)", [TINY])
    warm.execute(f"insert into docs select n, 'text', 'note', {VECTOR} from unnest('{{1, 11, 21}}'::int[]) n", [1])
    return warm


def filled(connection: Connection, relation: str = "docs") -> list[int]:
    return column(connection, f"select id from {relation} where embedding is not null order by id")


def declared(connection: Connection) -> list[str]:
    """Those of the test's own that are served."""
    names = "select relation::text from embedding_columns where status = 'ready' and relation::text ~ '^(docs|p|q)'"
    return column(connection, f"{names} order by 1")


DETACH = {
    "p": ("alter table docs detach partition p", "alter table docs attach partition p for values from (0) to (10)"),
    "p concurrently": (
        "alter table docs detach partition p concurrently",
        "alter table docs attach partition p for values from (0) to (10)",
    ),
    "q": ("alter table docs detach partition q", "alter table docs attach partition q for values from (10) to (30)"),
    "q2": ("alter table q detach partition q2", "alter table q attach partition q2 for values from (20) to (30)"),
}


@pytest.mark.parametrize("case", DETACH)
@pytest.mark.parametrize("mode", ["deferred", "immediate"])
def test_text_changed_while_the_partition_is_away(docs: Connection, case: str, mode: str) -> None:
    detach, attach = DETACH[case]
    name = case.split(maxsplit=1)[0]
    docs.execute("select embed_column_set('docs', 'embedding', mode => %s)", [mode])
    triggers = column(docs, "select tgname from pg_trigger where tgrelid = 'docs'::regclass order by 1")
    indexes = scalar(docs, "select count(*) from pg_indexes where schemaname = current_schema()")
    docs.execute(detach)
    assert declared(docs) == ["docs", name]
    assert scalar(docs, "select count(*) from pg_indexes where schemaname = current_schema()") == indexes
    docs.execute(f"update {name} set note = 'changed' where id in (1, 21)")
    gone = {"p": 1, "q": 21, "q2": 21}[name]
    if mode == "deferred":
        assert gone not in filled(docs, name)
    docs.execute(attach)
    assert declared(docs) == ["docs"]
    assert filled(docs) == ([i for i in (1, 11, 21) if i != gone] if mode == "deferred" else [1, 11, 21])
    docs.execute("update docs set note = 'changed again'")
    assert filled(docs) == ([] if mode == "deferred" else [1, 11, 21])
    docs.execute("call embed_pending(32, 'docs')")
    far = "select max(embedding <-> embed(content || E'\\n' || note, %s, 'document')) from docs"
    assert scalar(docs, far, [TINY]) < 1e-5
    assert column(docs, "select tgname from pg_trigger where tgrelid = 'docs'::regclass order by 1") == triggers
    assert scalar(docs, "select count(*) from pg_indexes where schemaname = current_schema()") == indexes


def test_detached_partition_is_filled_and_dropped_by_itself(docs: Connection) -> None:
    with notices(docs) as heard:
        docs.execute("alter table docs detach partition q")
    assert [(n.severity, n.message) for n in heard] == [
        ("NOTICE", f"{scalar(docs, 'select current_schema()')}.q.embedding stays declared, as a table of its own")
    ]
    docs.execute("update q set note = 'changed'")
    assert scalar(docs, "call embed_pending(32, 'q')") == 2
    docs.execute("alter table q detach partition q1")
    assert declared(docs) == ["docs", "q", "q1"]
    docs.execute("select embed_column_drop('q')")
    docs.execute("drop table q1")
    assert declared(docs) == ["docs"]
    assert filled(docs) == [1]
    indexes = "select indexname from pg_indexes where schemaname = current_schema() and tablename = 'q2' order by 1"
    assert column(docs, indexes) == ["q2_pkey"]
    docs.execute("begin; drop extension pg_autoembed; rollback")


def test_table_with_vectors_of_its_own_is_attached(docs: Connection) -> None:
    docs.execute(f"create table p2 {COLUMNS}")
    docs.execute(f"insert into p2 values (31, 'text', 'note', {VECTOR})", [1])
    docs.execute("create table p3 (like p2)")
    with notices(docs) as heard:
        docs.execute("alter table docs attach partition p3 for values from (40) to (50)")
        docs.execute("create table p4 partition of docs for values from (50) to (60)")
    assert heard == []
    with notices(docs) as heard:
        docs.execute("alter table docs attach partition p2 for values from (30) to (40)")
    assert "p2.embedding keeps the vectors that it may have" in str(heard[0].message)
    docs.execute(str(heard[0].hint).partition("texts: ")[2])
    assert filled(docs) == [1, 11, 21]


@pytest.mark.parametrize("other", ["source", "model"])
def test_table_that_is_declared_otherwise_is_not_attached(docs: Connection, other: str, fragile: Path) -> None:
    docs.execute(f"create table p2 {COLUMNS}; alter table p2 add primary key (id)")
    model, source = (TINY, ["content"]) if other == "source" else (fragile.name, ["content", "note"])
    docs.execute("select embed_column('p2', %s::name[], model => %s)", [source, model])
    attach = "alter table docs attach partition p2 for values from (30) to (40)"
    refused = refusal(docs, attach)
    assert refused.sqlstate == "55000"
    assert "declared otherwise" in str(refused)
    docs.execute(str(refused.diag.message_hint).partition(": ")[2])
    docs.execute(attach)
    assert declared(docs) == ["docs"]


def test_partitions_of_a_restored_table_are_known(docs: Connection) -> None:
    """They were there before the declaration was: nothing is said of them, and nothing made."""
    with notices(docs) as heard:
        docs.execute("select embed_column_drop('docs')")
        docs.execute("select embed_column('docs', array['content', 'note'], model => %s)", [TINY])
    assert len(heard) == 1
    assert "has vectors already" in str(heard[0].message)
    assert scalar(docs, "select count(*) from autoembed.partition p join pg_class c on c.oid = p.relation") >= 5


# --- two at once -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["set (fillfactor = 70)", "add check (id is not null)"])
def test_two_partitions_are_altered_at_once(docs: Connection, change: str) -> None:
    """Neither transaction waits for the other: the declared table's registration is not theirs."""
    generation = scalar(docs, "select generation from autoembed.registration where relation = 'docs'::regclass")
    schema = scalar(docs, "select current_schema()")
    with psycopg.connect(docs.info.dsn) as other, docs.transaction(force_rollback=True):
        docs.execute(f"alter table p {change}")
        other.execute("set lock_timeout = '5s'")
        other.execute(f"alter table {schema}.q1 {change}")
        other.rollback()
    docs.execute(f"alter table p {change}")
    declared = "select generation from autoembed.registration where relation = 'docs'::regclass"
    assert scalar(docs, declared) == generation


# --- what DDL costs others -------------------------------------------------------------------------------------------


def test_alter_of_an_undeclared_table_reads_no_more_with_many_declared(docs: Connection) -> None:
    """Each declared table has rows in pg_trigger, which is not read through. A few registrations fit a page or two."""
    docs.execute("create table mine (id int)")

    def triggers_read() -> int:
        docs.execute("select pg_stat_force_next_flush()")  # what is not flushed yet would count again
        with docs.transaction():
            docs.execute("alter table mine set (fillfactor = 70)")
            seen = (
                "select seq_tup_read + idx_tup_fetch from pg_stat_xact_all_tables where relid = 'pg_trigger'::regclass"
            )
            return int(scalar(docs, seen))

    triggers_read()
    before = triggers_read()
    docs.execute(
        "do $$ begin for n in 1..40 loop "
        "execute format('create table many%s (id int primary key, content text, embedding vector(32))', n); "
        f"perform embed_column(format('many%s', n)::regclass, 'content', model => '{TINY}'); end loop; end $$"
    )
    assert triggers_read() <= before


def test_planner_settings_compile_no_event_trigger(docs: Connection) -> None:
    """What is switched off counts as very expensive, which jit takes for worth compiling."""
    settings = "select proname from pg_proc where prosecdef and pronamespace = 'autoembed'::regnamespace "
    assert column(docs, settings + "and not 'jit=off' = any (proconfig)") == []
