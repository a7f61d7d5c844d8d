"""embed_search and embed_index: the right rows in the right order, by the index, whatever the filter."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from psycopg import errors, sql

from conftest import Database
from support.rigging import Rig, Row, fill, rows, scalar
from support.server import Connection, Server
from support.stubs import add_stub
from support.talk import column

pytest_plugins = ["support.rig"]

Knowledge = Callable[..., str]


@pytest.fixture
def server(rig: Rig) -> Server:
    return rig.server


@pytest.fixture
def filled(db: Connection, declared: Knowledge) -> None:
    """50 rows with vectors, one still without."""
    declared(50)
    fill(db)
    db.execute("insert into knowledge (content) values ('waiting')")


@pytest.fixture(scope="module")
def big_database(shared_rig: Rig) -> Iterator[Database]:
    """6,000 rows of 16 dimensions and topics of 1 % each: `big` with an HNSW index, `lists` with one of ivfflat."""
    database = Database(shared_rig.server, "big")
    database.create()
    with shared_rig.server.connect("big") as db:
        db.execute(
            "create table big (id int primary key, content text, topic int, embedding vector(16));"
            "select setseed(0.5);"
            "insert into big select n, 'text ' || n, n % 100, (select array_agg(random() - 0.5)"
            " from generate_series(1, 16) d where d + n > 0)::vector from generate_series(1, 6000) n"
        )
        db.execute("create table lists (like big including all); insert into lists select * from big")
        for relation in ("big", "lists"):
            db.execute("select embed_column(%s::regclass, 'content'::name, model => 'stub-16')", [relation])
        db.execute("select embed_index('big')")
        db.execute("create index on lists using ivfflat (embedding vector_cosine_ops) with (lists = 600)")
        db.execute("analyze big, lists")
    yield database
    database.drop()


@pytest.fixture
def big(big_database: Database) -> Iterator[Connection]:
    """A connection to it."""
    with big_database.server.connect("big") as connection:
        yield connection


def search(connection: Connection, relation: str, query: str, **options: object) -> list[Row]:
    given = [sql.SQL("{} => {}").format(sql.Identifier(name), value) for name, value in options.items()]
    arguments = sql.SQL(", ").join([sql.Literal(relation), sql.Literal(query), *given])
    return connection.execute(sql.SQL("select * from embed_search({})").format(arguments)).fetchall()


def numbers(vector: str) -> NDArray[Any]:
    return np.array(json.loads(vector))


def oracle(
    connection: Connection, relation: str, query: str, model: str, where: str = "true"
) -> list[tuple[float, int]]:
    """Distance and id of each row, nearest first, without the database's help."""
    asked = numbers(scalar(connection, "select embed(%s, %s, 'query')::text", query, model))
    found = []
    for key, text in rows(
        connection, f"select id, embedding::text from {relation} where embedding is not null and {where}"
    ):
        vector = numbers(text)
        cosine = asked @ vector / (np.linalg.norm(asked) * np.linalg.norm(vector))
        found.append((float(1 - cosine), int(key)))
    return sorted(found)


# --- what is found ---------------------------------------------------------------------------------------------


def test_nearest_first_with_the_right_distances(db: Connection, filled: None) -> None:
    found = search(db, "knowledge", "what is vacuum", k=50)
    wanted = oracle(db, "knowledge", "what is vacuum", "stub-384")
    assert [key["id"] for key, _, _ in found] == [key for _, key in wanted]
    assert [distance for _, distance, _ in found] == pytest.approx([distance for distance, _ in wanted], abs=1e-5)
    contents: dict[int, str] = dict(rows(db, "select id, content from knowledge"))
    assert [content for _, _, content in found] == [contents[key["id"]] for key, _, _ in found]


def test_ten_rows_by_default_and_never_more_than_there_are(db: Connection, filled: None) -> None:
    assert len(search(db, "knowledge", "a query")) == 10
    assert len(search(db, "knowledge", "a query", k=1)) == 1
    assert len(search(db, "knowledge", "a query", k=1000)) == 50


@pytest.mark.parametrize("k", [0, -1, 1001, None])
def test_k_out_of_range(db: Connection, filled: None, k: int | None) -> None:
    with pytest.raises(errors.InvalidParameterValue, match="k is") as caught:
        search(db, "knowledge", "a query", k=k)
    assert caught.value.diag.message_hint == "k is 1 to 1000."


def test_null_query(db: Connection, filled: None) -> None:
    with pytest.raises(errors.NullValueNotAllowed):
        db.execute("select * from embed_search('knowledge', null)")


def test_relation_that_is_not_declared(db: Connection, knowledge: Knowledge) -> None:
    knowledge(1)
    with pytest.raises(errors.UndefinedObject, match="not declared"):
        search(db, "knowledge", "a query")
    with pytest.raises(errors.UndefinedObject, match="not declared"):
        db.execute("select embed_index('knowledge')")


def test_query_is_encoded_once(db: Connection, filled: None, rig: Rig) -> None:
    rig.reset()
    search(db, "knowledge", "a query", k=50)
    assert [texts for _, texts in rig.encodings()] == [1]


def test_keys_have_their_columns_names(db: Connection) -> None:
    db.execute('create table parts (b text, "A 1" int, title text, body text, vec vector(384), primary key ("A 1", b))')
    db.execute("insert into parts values ('x', 1, 'head', 'tail', null)")
    db.execute("select embed_column('parts', array['title', 'body']::name[], 'vec')")
    fill(db)
    ((key, _, content),) = search(db, "parts", "a query", target="vec")
    assert key == {"A 1": 1, "b": "x"}
    assert content == "head\ntail"


def test_partitions_are_searched(db: Connection) -> None:
    db.execute("create table parted (id int primary key, content text, embedding vector(384)) partition by hash (id)")
    db.execute("create table part0 partition of parted for values with (modulus 2, remainder 0)")
    db.execute("create table part1 partition of parted for values with (modulus 2, remainder 1)")
    db.execute("insert into parted select g, 'text ' || g from generate_series(1, 20) g")
    db.execute("select embed_column('parted', 'content'::name)")
    fill(db)
    db.execute("select embed_index('parted')")
    found = search(db, "parted", "a query", k=20)
    assert [key["id"] for key, _, _ in found] == [key for _, key in oracle(db, "parted", "a query", "stub-384")]


@pytest.mark.parametrize("path", ["", "pg_catalog", "somewhere"])
def test_any_search_path(db: Connection, filled: None, path: str) -> None:
    db.execute("create schema somewhere")
    db.execute("create function somewhere.embed(text, text, text) returns int language sql as 'select 1 / 0'")
    db.execute("select set_config('search_path', %s, false)", [path])
    assert (
        len(rows(db, "select * from public.embed_search('public.knowledge', 'a query', filter => '{\"id\": 3}')")) == 1
    )


def test_model_that_changed_is_refused(db: Connection, knowledge: Knowledge, rig: Rig) -> None:
    knowledge(3)
    folder = add_stub(rig.models, f"stub-search-{len(list(rig.models.iterdir()))}")
    db.execute("select embed_column('knowledge', 'content'::name, model => %s::text)", [folder.name])
    fill(db)
    (folder / "model.safetensors").unlink()
    (folder / "autoembed.json").unlink()
    folder.rmdir()
    add_stub(rig.models, folder.name, weights="others")
    with pytest.raises(errors.ObjectNotInPrerequisiteState, match="not the one"):
        search(db, "knowledge", "a query")


# --- filters ---------------------------------------------------------------------------------------------------


@pytest.fixture
def tagged(db: Connection, declared: Knowledge) -> None:
    declared(12)
    db.execute(
        """create type mood as enum ('sad', 'glad'); create domain some_ids as int[]; create domain word as text;
           alter table knowledge add topic text, add stars int, add live boolean, add tags jsonb, add "The day" date,
               add words text[], add names varchar(9)[], add ids some_ids, add own word[], add moods mood[],
               add times timestamptz[];
           update knowledge set topic = (array['a', 'b''"\\', null])[id % 3 + 1], stars = id % 4, live = id % 2 = 0,
               tags = jsonb_build_object('n', id % 2, 'list', jsonb_build_array(id)),
               "The day" = date '2024-1-1' + id::int,
               words = (array['{food,baking}', '{food,"a,b"}', '{}', null]::text[])[id % 4 + 1]::text[],
               names = array['n' || id], ids = array[id, id % 3], own = array['w' || id % 3]::word[],
               moods = array[case when id > 5 then 'sad' else 'glad' end]::mood[],
               times = array[timestamptz '2024-01-01 00:00+00' + id * interval '1 hour']
        """
    )
    fill(db)


@pytest.mark.parametrize(
    ("filter", "where"),
    [
        ({}, "true"),
        ({"topic": "a"}, "topic = 'a'"),
        ({"topic": "b'\"\\"}, "topic = 'b''\"\\'"),
        ({"topic": None}, "topic is null"),
        ({"topic": ["a", "none"]}, "topic in ('a', 'none')"),
        ({"topic": []}, "false"),
        ({"stars": 3}, "stars = 3"),
        ({"stars": [1, 2]}, "stars in (1, 2)"),
        ({"live": True}, "live"),
        ({"The day": "2024-01-05"}, "\"The day\" = '2024-01-05'"),
        ({"tags": {"n": 1}}, "tags @> '{\"n\": 1}'"),
        ({"tags": {"list": [4]}}, "tags @> '{\"list\": [4]}'"),
        ({"words": "food"}, "'food' = any (words)"),
        ({"words": ["none", "a,b"]}, "'a,b' = any (words)"),
        ({"words": []}, "false"),
        ({"words": None}, "words is null"),
        ({"names": ["n3", "n4", None]}, "id in (3, 4)"),
        ({"ids": 1}, "1 = any (ids)"),
        ({"own": "w1"}, "mod(id, 3) = 1"),
        ({"moods": "sad"}, "id > 5"),
        ({"times": "2024-01-01 07:00+02"}, "id = 5"),
        ({"topic": "a", "live": False}, "topic = 'a' and not live"),
        ({"id": 7}, "id = 7"),
    ],
    ids=str,
)
def test_filters(db: Connection, tagged: None, filter: dict[str, Any], where: str) -> None:  # noqa: A002
    found = search(db, "knowledge", "a query", k=12, filter=json.dumps(filter))
    wanted = oracle(db, "knowledge", "a query", "stub-384", where)
    assert [key["id"] for key, _, _ in found] == [key for _, key in wanted]


@pytest.mark.parametrize(
    ("filter", "state"),
    [
        ('{"no such": 1}', "42703"),
        ('{"topic": {"a": 1}}', "22023"),
        ('{"topic": ["a", ["b"]]}', "22023"),
        ('{"words": [{"a": 1}]}', "22023"),
        ("[1]", "22023"),
        ('"topic"', "22023"),
        ('{"stars": "many"}', "22P02"),
        ('{"topic = topic or true --": "a"}', "42703"),
    ],
)
def test_filters_that_make_no_sense(db: Connection, tagged: None, filter: str, state: str) -> None:  # noqa: A002
    with pytest.raises(errors.Error) as caught:
        search(db, "knowledge", "a query", filter=filter)
    assert caught.value.sqlstate == state


ODD = {
    "int4range": "[1,2)",
    "int4multirange": "{[1,2)}",
    "int4range[]": "{}",
    "json": "1",
    "jsonb[]": "{1}",
    "pair": "(1,2)",
    "point": "(1,2)",
    "tsvector": "a",
    "vector": "[1]",
}
"""Types that a filter does not compare, each with a value."""


@pytest.mark.parametrize("type_name", ODD)
@pytest.mark.parametrize("value", ["1", '["1"]'])
def test_filters_on_what_is_not_compared(db: Connection, declared: Knowledge, type_name: str, value: str) -> None:
    declared(1)
    db.execute("create type pair as (a int, b int)")
    db.execute(f"alter table knowledge add odd {type_name} default '{ODD[type_name]}'")
    with pytest.raises(
        errors.InvalidParameterValue, match=r"cannot compare column odd of public.knowledge, of type "
    ) as caught:
        search(db, "knowledge", "a query", filter=f'{{"odd": {value}}}')
    assert "arrays of these" in (caught.value.diag.message_hint or "")
    assert search(db, "knowledge", "a query", filter='{"odd": null}') == []


# --- the index -------------------------------------------------------------------------------------------------


def plans(connection: Connection, relation: str, **options: object) -> str:
    """The plans of a search as they ran."""
    said: list[str] = []
    connection.add_notice_handler(lambda notice: said.append(notice.message_primary or ""))
    for setting in ("log_min_duration = 0", "log_nested_statements = on", "log_level = 'notice'"):
        connection.execute(f"load 'auto_explain'; set auto_explain.{setting}")
    search(connection, relation, "a query", **options)
    connection.execute("set auto_explain.log_min_duration = -1")
    return "\n".join(said)


def test_search_goes_by_the_index(big: Connection) -> None:
    search(big, "big", "warm")
    assert "Index Scan using big_embedding_hnsw" in plans(big, "big")


@pytest.mark.parametrize("k", [10, 100, 300])
def test_the_index_finds_what_is_nearest(big: Connection, k: int) -> None:
    found = {key["id"] for key, _, _ in search(big, "big", "a query", k=k)}
    wanted = {key for _, key in oracle(big, "big", "a query", "stub-16")[:k]}
    assert len(found) == k
    assert len(found & wanted) >= 0.9 * k


@pytest.mark.parametrize(("filter", "count"), [('{"topic": 7}', 60), ('{"topic": [7, 8]}', 120), ('{"id": 77}', 1)])
def test_filtered_search_finds_k_rows(big: Connection, filter: str, count: int) -> None:  # noqa: A002
    for k in (10, 40):
        found = search(big, "big", "a query", k=k, filter=filter)
        assert len(found) == min(k, count)
        assert [distance for _, distance, _ in found] == sorted(distance for _, distance, _ in found)


BY_INDEX = "set enable_seqscan = off; set enable_sort = off; set enable_bitmapscan = off; set jit = off"


def test_filtered_search_by_the_index_alone_finds_k_rows(big: Connection) -> None:
    big.execute(BY_INDEX)
    assert "big_embedding_hnsw" in plans(big, "big", k=20, filter='{"topic": 7}')
    found = search(big, "big", "a query", k=20, filter='{"topic": 7}')
    assert len(found) == 20


@pytest.mark.parametrize(
    ("k", "options"),
    [(10, {}), (100, {}), (1000, {}), (10, {"filter": '{"topic": 7}'}), (40, {"filter": '{"topic": 7}'})],
)
def test_search_by_ivfflat_finds_k_rows(big: Connection, k: int, options: dict[str, str]) -> None:
    """600 lists of ten rows each, of which pgvector reads one by itself."""
    big.execute("set enable_seqscan = off; set enable_bitmapscan = off; set jit = off")
    assert "lists_embedding_idx" in plans(big, "lists", k=k, **options)
    found = search(big, "lists", "a query", k=k, **options)
    wanted = oracle(big, "lists", "a query", "stub-16", "topic = 7" if options else "true")[:k]
    assert len(found) == k
    assert [distance for _, distance, _ in found] == sorted(distance for _, distance, _ in found)
    assert len({key["id"] for key, _, _ in found} & {key for _, key in wanted}) >= 0.5 * k


LIMITS = ("hnsw.max_scan_tuples = 1", "hnsw.scan_mem_multiplier = 1; set work_mem = '64kB'", "ivfflat.max_probes = 1")


@pytest.mark.parametrize("relation", ["big", "lists"])
@pytest.mark.parametrize("limit", LIMITS)
def test_filter_that_takes_more_than_the_index_gives(big: Connection, relation: str, limit: str) -> None:
    """pgvector stops at limits of its own; the table is read then, and every row is there, nearest first."""
    big.execute("load 'vector'")
    big.execute(f"{BY_INDEX}; set {limit}")
    found = search(big, relation, "a query", k=70, filter='{"topic": 7}')
    wanted = oracle(big, relation, "a query", "stub-16", "topic = 7")
    assert [key["id"] for key, _, _ in found] == [key for _, key in wanted]


def test_policy_that_takes_more_than_the_index_gives(big: Connection, big_database: Database) -> None:
    big.execute("create role reader; grant select on big to reader")
    big.execute("grant execute on all functions in schema public to reader")
    big_database.roles.append("reader")
    big.execute("alter table big enable row level security; create policy seventh on big to reader using (topic = 7)")
    try:
        big.execute(f"load 'vector'; {BY_INDEX}; set hnsw.max_scan_tuples = 1; set role reader")
        found = search(big, "big", "a query", k=70)
    finally:
        big.execute("reset role; drop policy seventh on big; alter table big disable row level security")
    assert len(found) == 60


def test_table_is_not_read_where_the_index_gives_enough(big: Connection) -> None:
    big.execute("set enable_seqscan = off; set jit = off")
    big.execute("load 'auto_explain'; set auto_explain.log_analyze = on")
    for relation in ("big", "lists"):
        assert "never executed" in plans(big, relation, filter='{"topic": [1, 2, 3, 4, 5, 6, 7, 8]}')


SETTINGS = {
    "hnsw.ef_search": "17",
    "hnsw.iterative_scan": "off",
    "ivfflat.probes": "3",
    "ivfflat.iterative_scan": "off",
    "jit": "on",
}


@pytest.mark.parametrize("relation", ["big", "lists"])
def test_search_leaves_its_settings_behind_nowhere(big: Connection, relation: str) -> None:
    big.execute("load 'vector'; begin")
    for name, value in SETTINGS.items():
        big.execute(sql.SQL("set {} = {}").format(sql.Identifier(*name.split(".")), value))
    search(big, relation, "a query", k=200, filter='{"topic": 7}')
    for end in ("select", "commit"):
        big.execute(end)
        assert {name: scalar(big, "select current_setting(%s)", name) for name in SETTINGS} == SETTINGS


INDEX = "select indexdef from pg_indexes where tablename = 'knowledge' and indexdef like '%%hnsw%%'"


PARALLEL = """
    set max_parallel_workers_per_gather = 2; set parallel_setup_cost = 0; set parallel_tuple_cost = 0;
    set min_parallel_table_scan_size = 0
"""
QUERIES = {
    "embed": "select id from big where filler like '%xyz%' order by embed('one') <=> embed('two') limit 5",
    "joined": "select count(*) from big b join embed_search('knowledge', 'one') s on b.id % 1000 = (s.key->>'id')::int",
    "models": "select count(*) from big b, embedding_models where filler like '%xyz%'",
    "health": "select count(*) from big b, embedding_health where filler like '%xyz%'",
}


@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES)
def test_in_a_query_that_would_run_in_parallel(
    db: Connection, filled: None, connect: Callable[..., Connection], query: str
) -> None:
    """Python's calls make subtransactions: refused in parallel mode, they crashed the server at the next call."""
    db.execute("create table big as select n as id, repeat('x', 50) as filler from generate_series(1, 20000) n")
    db.execute("analyze big")
    fresh = connect()
    fresh.execute(PARALLEL)
    for _ in range(3):
        fresh.execute(query)
        assert scalar(fresh, "select embed('word') is not null")


def test_nothing_of_the_extensions_says_that_it_may_run_in_parallel(db: Connection) -> None:
    marked = """
        select p.oid::regprocedure from pg_proc p join pg_depend d on d.objid = p.oid and d.deptype = 'e'
        join pg_extension e on e.oid = d.refobjid and e.extname = 'pg_autoembed'
        where p.proparallel <> 'u'
    """
    assert rows(db, marked) == []


def test_index_as_documented(db: Connection, filled: None) -> None:
    statement = scalar(db, "select embed_index('knowledge')")
    (definition,) = (row[0] for row in rows(db, INDEX))
    assert "USING hnsw (embedding vector_cosine_ops) WITH (m='16', ef_construction='64')" in definition
    assert statement.startswith("create index knowledge_embedding_hnsw on public.knowledge")
    assert rows(db, "select embed_index('knowledge')") == []
    assert len(rows(db, INDEX)) == 1


def test_index_with_other_parameters(db: Connection, filled: None) -> None:
    db.execute("select embed_index('knowledge', m => 8, ef_construction => 200)")
    assert "m='8', ef_construction='200'" in rows(db, INDEX)[0][0]


def test_index_concurrently(db: Connection, filled: None) -> None:
    statement = scalar(db, "select embed_index('knowledge', concurrent => true)")
    assert rows(db, INDEX) == []
    db.execute(statement)
    assert len(rows(db, INDEX)) == 1


PARTS = """
    create schema "An other";
    create table readings_of_all_the_sensors (id int primary key, content text, embedding vector(384))
        partition by range (id);
    create table readings_of_all_the_sensors_in_2024 partition of readings_of_all_the_sensors
        for values from (0) to (10);
    create table readings_of_all_the_sensors_in_2025 partition of readings_of_all_the_sensors
        for values from (10) to (20);
    create table "An other"."rest" partition of readings_of_all_the_sensors default partition by hash (id);
    create table "An other"."rest 0" partition of "An other"."rest" for values with (modulus 2, remainder 0);
    create table "An other"."rest 1" partition of "An other"."rest" for values with (modulus 2, remainder 1);
    insert into readings_of_all_the_sensors select g, 'text ' || g from generate_series(1, 40) g;
    select embed_column('readings_of_all_the_sensors', 'content');
"""
VALID = "select bool_and(indisvalid), count(*) from pg_index i join pg_opclass o on o.oid = i.indclass[0]"
VALID += " where opcname = 'vector_cosine_ops'"
CONCURRENTLY = "select embed_index('readings_of_all_the_sensors', concurrent => true)"


@pytest.mark.parametrize("ran", [0, 1, 4, 7, 10])
def test_index_of_a_partitioned_table_concurrently(db: Connection, ran: int) -> None:
    """The statements run as they are; after some of them, those that are left are returned."""
    db.execute(PARTS)
    fill(db)
    statements = column(db, CONCURRENTLY)
    assert len(statements) == 11
    for statement in statements[:ran]:
        db.execute(statement)
    left = column(db, CONCURRENTLY)
    assert left == statements[ran:]
    for statement in left:
        db.execute(statement)
    assert column(db, CONCURRENTLY) == []
    assert rows(db, VALID) == [(True, 6)]


def test_index_of_a_partitioned_table_is_finished_at_once(db: Connection) -> None:
    db.execute(PARTS)
    for statement in column(db, CONCURRENTLY)[:4]:
        db.execute(statement)
    db.execute("select embed_index('readings_of_all_the_sensors')")
    assert rows(db, VALID) == [(True, 6)]


@pytest.mark.parametrize("concurrent", [True, False])
def test_index_that_was_broken_off_is_built_anew(db: Connection, filled: None, concurrent: bool) -> None:
    db.execute(column(db, "select embed_index('knowledge', concurrent => true)")[0])
    db.execute("update pg_index set indisvalid = false where indexrelid = 'knowledge_embedding_hnsw'::regclass")
    statements = column(db, f"select embed_index('knowledge', concurrent => {concurrent})")
    assert statements == [f"reindex index {'concurrently ' if concurrent else ''}public.knowledge_embedding_hnsw"]
    if concurrent:
        db.execute(statements[0])
    assert rows(db, VALID) == [(True, 1)]


@pytest.mark.parametrize(("m", "ef"), [(1, 64), (101, 500), (16, 31), (16, 1001), (None, 64)])
def test_index_parameters_out_of_range(db: Connection, filled: None, m: int | None, ef: int) -> None:
    with pytest.raises(errors.InvalidParameterValue, match="not possible"):
        db.execute("select embed_index('knowledge', m => %s, ef_construction => %s)", [m, ef])


def test_index_name_that_is_taken(db: Connection, filled: None) -> None:
    db.execute("create table knowledge_embedding_hnsw ()")
    db.execute("select embed_index('knowledge')")
    assert len(rows(db, INDEX)) == 1
