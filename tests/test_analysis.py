"""Many queries at once, rows like a row, rows that say the same: against exact answers in SQL."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from psycopg import errors

from support.rigging import Rig, fill, rows
from support.server import Connection, Server

pytest_plugins = ["support.rig"]


@pytest.fixture
def server(rig: Rig) -> Server:
    return rig.server


@pytest.fixture
def filled(db: Connection, declared: Callable[..., str]) -> None:
    """30 rows with vectors; two of them have the same text as another, and one is still without a vector."""
    declared(30)
    db.execute("insert into knowledge (content) select content from knowledge where id in (3, 7) order by id")
    fill(db)
    db.execute("insert into knowledge (content) values ('waiting')")


def test_many_queries_in_one_pass(db: Connection, filled: None) -> None:
    found = rows(db, "select * from embed_search('knowledge', array['one', 'two'], 3)")
    alone = "select %s::text, f.* from embed_search('knowledge', %s, 3) f"
    assert found == rows(db, alone, "one", "one") + rows(db, alone, "two", "two")
    assert rows(db, "select * from embed_search('knowledge', '{}'::text[])") == []
    with pytest.raises(errors.NullValueNotAllowed, match="a query is null"):
        db.execute("select embed_search('knowledge', array['one', null])")


def test_rows_like_a_row(db: Connection, filled: None) -> None:
    exact = (
        "select jsonb_build_object('id', b.id), a.embedding <=> b.embedding, b.content from knowledge a, knowledge b "
        "where a.id = 3 and b.id <> 3 and b.embedding is not null order by 2 limit 5"
    )
    found = rows(db, """select * from embed_similar('knowledge', '{"id": 3}', 5)""")
    assert found == rows(db, exact)
    assert found[0][:2] == ({"id": 31}, 0)
    filtered = rows(db, """select key from embed_similar('knowledge', '{"id": 3}', filter => '{"id": [3, 4]}')""")
    assert filtered == [({"id": 4},)]


def test_rows_like_a_row_of_a_composite_key(db: Connection) -> None:
    db.execute("create table pairs (b text, a numeric, content text, embedding vector(384), primary key (a, b))")
    db.execute("insert into pairs select 'x', n, 'text ' || n from generate_series(1, 4) n")
    db.execute("select embed_column('pairs', 'content'::name)")
    fill(db)
    keys = rows(db, """select key from embed_similar('pairs', '{"b": "x", "a": 2.0}')""")
    assert sorted(key["a"] for (key,) in keys) == [1, 3, 4]


@pytest.mark.parametrize(
    ("key", "error", "words"),
    [
        ('{"id": 99}', errors.NoDataFound, "no row with this key"),
        ('{"id": 33}', errors.ObjectNotInPrerequisiteState, "no vector yet"),
        ('{"ID": 3}', errors.InvalidParameterValue, "an object of its key columns"),
        ('{"id": 3, "content": "x"}', errors.InvalidParameterValue, "an object of its key columns"),
        ("3", errors.InvalidParameterValue, "an object of its key columns"),
        (None, errors.NullValueNotAllowed, "the key is null"),
    ],
)
def test_a_key_that_cannot_be_served(
    db: Connection, filled: None, key: str | None, error: type[errors.Error], words: str
) -> None:
    with pytest.raises(error, match=words):
        db.execute("select * from embed_similar('knowledge', %s)", [key])


def test_duplicates(db: Connection, filled: None) -> None:
    pairs = rows(db, "select key, duplicate, distance from embed_duplicates('knowledge') order by key")
    assert pairs == [({"id": 3}, {"id": 31}, 0), ({"id": 7}, {"id": 32}, 0)]
    exact = (
        "select least(a.id, b.id), greatest(a.id, b.id) from knowledge a cross join lateral ("
        "select c.id, c.embedding <=> a.embedding as distance from knowledge c where c.embedding is not null "
        "order by 2 limit 20) b where a.embedding is not null and b.distance <= 0.9 and a.id <> b.id"
    )
    wide = rows(db, "select (key ->> 'id')::int, (duplicate ->> 'id')::int from embed_duplicates('knowledge', 0.9)")
    assert sorted(wide) == sorted(set(rows(db, exact)))
    with pytest.raises(errors.InvalidParameterValue, match="within is -1"):
        db.execute("select embed_duplicates('knowledge', -1)")


def test_settings_are_left_as_they_were(db: Connection, filled: None) -> None:
    db.execute("select embed_index('knowledge')")
    former = rows(db, "select name, setting from pg_settings where name ~ '^(hnsw|ivfflat)' or name = 'jit'")
    db.execute("select embed_duplicates('knowledge'), embed_search('knowledge', array['one'])")
    db.execute("""select embed_similar('knowledge', '{"id": 3}')""")
    assert rows(db, "select name, setting from pg_settings where name ~ '^(hnsw|ivfflat)' or name = 'jit'") == former
