"""A session's settings: those of the caller reach his table's own code, and none of ours do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from psycopg import sql

from conftest import Database
from support.rigging import Rig, fill, pending, rows, scalar
from support.server import Connection, Server

pytest_plugins = ["support.rig"]

Connect = Callable[..., Connection]

NOTE = """
create table setting as select name, setting from pg_settings where context in ('user', 'superuser') with no data;
create table noted (place text, name text, setting text);
create function note(place text) returns boolean language plpgsql as $$
begin
    insert into public.noted
    select note.place, c.name, c.setting from pg_catalog.pg_settings c join public.setting s using (name)
    where c.setting is distinct from s.setting;
    insert into public.noted values (note.place, 'called', null);
    return true;
end
$$;
create function note_write() returns trigger language plpgsql as $$
begin
    perform public.note(tg_op || ' ' || tg_when);
    return new;
end
$$;
create table moment (at timestamptz, content text, embedding vector(384), primary key (at));
create policy noting on moment using (note('policy'));
alter table moment enable row level security, force row level security;
create trigger noting before update on moment for each row execute function note_write();
create trigger noting_after after update on moment for each row execute function note_write();
"""
ODD = {
    "timezone": "Asia/Tokyo",
    "intervalstyle": "iso_8601",
    "bytea_output": "escape",
    "extra_float_digits": "-3",
    "enable_hashjoin": "off",
    "work_mem": "1234kB",
}


@pytest.fixture
def server(rig: Rig) -> Server:
    return rig.server


@pytest.fixture
def owner(database: Database, db: Connection, connect: Connect) -> Connection:
    """An ordinary owner's connection: row-level security applies to him."""
    role = f"{database.name}_owner"
    db.execute(sql.SQL("create role {} login").format(sql.Identifier(role)))
    database.roles.append(role)
    db.execute(sql.SQL("grant create on schema public to {}").format(sql.Identifier(role)))
    db.execute(sql.SQL("grant execute on all routines in schema public to {}").format(sql.Identifier(role)))
    return connect(role)


def test_policies_and_triggers_run_under_the_callers_settings(owner: Connection) -> None:
    for name, value in ODD.items():
        owner.execute(sql.SQL("set {} = {}").format(sql.Identifier(name), value))
    owner.execute(NOTE)
    owner.execute("insert into setting select name, setting from pg_settings where context in ('user', 'superuser')")
    owner.execute("select embed_column('moment', 'content'::name)")
    owner.execute(
        """insert into moment
           select timestamptz '2024-01-01 00:00+00' + g * interval '1 hour',
                  case g when 3 then 'raiseword' else 'text' end || g
           from generate_series(1, 9) g"""
    )
    assert fill(owner) == (8, 1, 0)
    owner.execute("update moment set content = content || ' again' where extract(minute from at) = 0 and random() >= 0")
    owner.execute("call embed_worker(max_seconds => 1)")
    assert pending(owner, "moment") == 1
    owner.execute("delete from moment where embedding is null")
    owner.execute("call embed_wait('moment')")
    places = {"policy", "UPDATE BEFORE", "UPDATE AFTER"}
    assert set(rows(owner, "select distinct place, name from noted")) == {(place, "called") for place in places}


def test_rows_key_is_the_same_in_every_session(db: Connection, owner: Connection, connect: Connect) -> None:
    owner.execute("create table moment (at timestamptz, took interval, id bytea, part real, content text, "
                  "embedding vector(384), primary key (at, took, id, part))")  # fmt: skip
    owner.execute("select embed_column('moment', 'content'::name)")
    owner.execute(r"insert into moment values ('2024-01-01 10:00+01', '-1 day 02:00', '\x00ff5c', 0.1, 'raiseword')")
    keys = "select key from autoembed.failure"
    assert fill(owner) == (0, 1, 0)
    assert scalar(owner, keys) == ["2024-01-01T09:00:00+00:00", "-1 days +02:00:00", "\\x00ff5c", 0.1]
    db.execute("update autoembed.failure set next_try = now()")
    for name, value in ODD.items():
        owner.execute(sql.SQL("set {} = {}").format(sql.Identifier(name), value))
    assert fill(owner) == (0, 1, 0)
    assert rows(owner, "select attempts from autoembed.failure") == [(2,)]
    owner.execute("update moment set content = 'fine now'")
    assert fill(owner) == (1, 0, 0)
    assert rows(owner, keys) == []
