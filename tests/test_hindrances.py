"""What keeps a declared column from being filled is its status, whatever the DDL was, and health says so."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import psycopg
import pytest

from support.server import Connection
from support.talk import acting_as, refusal, scalar

pytest_plugins = ["support.warm"]

TABLE = (
    "create table docs (id int not null default 1, other int not null default 0, content text, embedding vector(32))"
)
PARTED = (
    f"{TABLE} partition by range (id)",
    "create table low partition of docs for values from (0) to (10)",
    "create table high partition of docs for values from (10) to (20)",
)
KEY = "alter table docs add primary key (id)"
DECLARE = "select embed_column('docs', 'content', model => 'tiny-mpnet', mode => %s)"
STATUS = "select status from embedding_columns where relation = %s::regclass"
ROW_TRIGGER = "(select tgname from pg_trigger where tgrelid = 'docs'::regclass and tgtype & 1 = 1)"


@dataclass(frozen=True)
class Case:
    """DDL, the status that follows it, and whether a row is filled all the same."""

    ddl: str | tuple[str, ...]
    status: str = "ready"
    fills: bool = True
    mode: str = "deferred"
    parted: bool = False
    key: str = KEY
    after: str = ""
    """What takes out of the way what the schema does not."""

    @property
    def statements(self) -> tuple[str, ...]:
        return (self.ddl,) if isinstance(self.ddl, str) else self.ddl


def never(ddl: str | tuple[str, ...], status: str, **options: object) -> Case:
    """A case in which no row is filled."""
    return replace(Case(ddl, status, fills=False), **options)  # type: ignore[arg-type]


FORCED = "alter table docs enable row level security, force row level security"
HIDDEN = "row-level security"
NO_IDENTITY = "alter table docs replica identity nothing"
PUBLISHED = "create publication news for table docs"
UNPUBLISH = "drop publication news"
UNIQUE = "create unique index on docs (id)"
DEFAULT = "array_fill(1::real, array[32])::vector"
REPLICA = "do $$ begin execute format('alter table docs enable replica trigger %I', {row_trigger}); end $$"
ABOVE = (
    "create table above (like docs) partition by range (id)",
    "alter table above attach partition docs for values from (0) to (100)",
)
NO_KEY = "alter table docs drop constraint docs_pkey"
INVALID = "update pg_index set indisvalid = false where indexrelid = 'docs_embedding_pending'::regclass"

CASES = {
    # pg_class, pg_publication
    "unlogged": Case("alter table docs set unlogged"),
    "renamed": Case(("alter table docs rename to papers", "alter table papers rename to docs")),
    "storage parameter": Case("alter table docs set (fillfactor = 50)"),
    "no identity": Case(NO_IDENTITY),
    "published": Case(PUBLISHED, after=UNPUBLISH),
    "published, no identity": never((NO_IDENTITY, PUBLISHED), "publishes the UPDATEs of docs", after=UNPUBLISH),
    "inserts published": Case((NO_IDENTITY, f"{PUBLISHED} with (publish = 'insert')"), after=UNPUBLISH),
    "schema published": never(
        (NO_IDENTITY, "create publication news for tables in schema {schema}"), "publishes", after=UNPUBLISH
    ),
    "all published": never((NO_IDENTITY, "create publication news for all tables"), "publishes", after=UNPUBLISH),
    "published, no primary key": never(PUBLISHED, "publishes", key=UNIQUE, after=UNPUBLISH),
    "published, another key": Case(
        ("alter table docs replica identity using index docs_id_idx", PUBLISHED), key=UNIQUE, after=UNPUBLISH
    ),
    "partition published": never(
        ("alter table low replica identity nothing", PUBLISHED), "UPDATEs of low", parted=True, after=UNPUBLISH
    ),
    "update revoked": never("revoke update on docs from {owner}", "may not read and update"),
    "schema revoked": never(
        "revoke all on schema {schema} from {owner}",
        "may not read and update",
        after="grant all on schema {schema} to {owner}",
    ),
    # pg_policy
    "rows hidden": never((FORCED, "create policy p on docs using (id < 0)"), HIDDEN),
    "no policy": never(FORCED, HIDDEN),
    "restrictive policy": never(
        (FORCED, "create policy p on docs using (true)", "create policy q on docs as restrictive using (id < 0)"),
        HIDDEN,
    ),
    "nothing hidden": Case((FORCED, "create policy p on docs using (true)")),
    "read alone": never((FORCED, "create policy p on docs for select using (true)"), HIDDEN),
    "owner not concerned": Case("alter table docs enable row level security"),
    # pg_attribute
    "target not null": never("alter table docs alter embedding set not null", "docs.embedding is NOT NULL"),
    "partition's not null": never(
        "alter table low alter embedding set not null", "low.embedding is NOT NULL", parted=True
    ),
    "default": Case(f"alter table docs alter embedding set default {DEFAULT}", "docs.embedding has a default"),
    "partition's default": Case(
        f"alter table low alter embedding set default {DEFAULT}", "low.embedding has a default", parted=True
    ),
    "default null": Case("alter table docs alter embedding set default null::vector(32)"),
    "source's default": Case("alter table docs alter content set default 'x', alter content set not null"),
    "storage": Case("alter table docs alter embedding set storage plain"),
    "key renamed": Case("alter table docs rename id to number"),
    "columns come and go": Case("alter table docs add more int, drop other"),
    # pg_trigger
    "triggers off": Case("alter table docs disable trigger all", "row trigger on docs is off"),
    "in replicas alone": Case(REPLICA, "row trigger on docs is off"),
    "partition's off": Case("alter table low disable trigger all", "row trigger on low is off", parted=True),
    "off, immediate": Case("alter table docs disable trigger all", "row trigger on docs is off", mode="immediate"),
    "statement trigger off": Case(
        'alter table docs disable trigger "~autoembed_embedding_insert"', "statement trigger on docs", mode="immediate"
    ),
    "partition's statement trigger off": Case(
        'alter table low disable trigger "~autoembed_embedding_update"',
        "statement trigger on low",
        mode="immediate",
        parted=True,
    ),
    "statement trigger dropped": Case(
        'drop trigger "~autoembed_embedding_insert" on docs', "lacks a statement trigger", mode="immediate"
    ),
    "partition's dropped": Case(
        'drop trigger "~autoembed_embedding_update" on low', "lacks a statement trigger", mode="immediate", parted=True
    ),
    "a trigger of the user's": Case(
        "create trigger own before update on docs for each row execute function suppress_redundant_updates_trigger()"
    ),
    # pg_rewrite
    "rule instead": never("create rule r as on update to docs do instead nothing", "rule r rewrites"),
    "rule also": never("create rule r as on update to docs do also select 1", "rule r rewrites"),
    "rule off": Case(("create rule r as on update to docs do instead nothing", "alter table docs disable rule r")),
    "rule on insert": Case("create rule r as on insert to docs do also select 1"),
    # pg_inherits
    "parent of others": Case("create table child () inherits (docs)"),
    "made a partition": Case(ABOVE),
    "made a partition, immediate": Case(ABOVE, "by way of the partitioned table", mode="immediate"),
    "partition of another": Case("alter table low owner to postgres", "low belongs to postgres", parted=True),
    # pg_constraint, pg_index
    "key dropped": never(NO_KEY, "no key: it has neither"),
    "key deferrable": never(f"{NO_KEY}, add primary key (id) deferrable", "no key: its key is deferrable"),
    "key with nulls": never(f"{NO_KEY}, alter id drop not null, add unique (id)", "no key: it has neither"),
    "key of no scalar": Case(
        f"{NO_KEY}, drop id, add id jsonb not null default '1', add primary key (id)", "no key: its key has a type"
    ),
    "another key": Case(f"{NO_KEY}, add primary key (other)", "no pending index"),
    "second key": Case("alter table docs add unique (other)"),
    "check": Case("alter table docs add check (length(content) > 0)"),
    "pending index dropped": Case("drop index docs_embedding_pending", "no pending index"),
    "pending index not valid": Case(INVALID, "no pending index"),
}


@pytest.fixture
def owner(warm: Connection, warm_role: Callable[..., str]) -> str:
    """An owner who may do what the documents grant to one."""
    name = warm_role("alice")
    warm.execute(f"grant execute on all functions in schema public to {name}")
    warm.execute(f"grant execute on all procedures in schema public to {name}")
    return name


def make(connection: Connection, owner: str, case: Case) -> None:
    for statement in (*(PARTED if case.parted else (TABLE,)), case.key):
        connection.execute(statement)
    for relation in ("docs", "low", "high") if case.parted else ("docs",):
        connection.execute(f"alter table {relation} owner to {owner}")


def apply(connection: Connection, owner: str, statements: tuple[str, ...]) -> None:
    schema = scalar(connection, "select current_schema()")
    for statement in statements:
        filled = statement.replace("{owner}", owner).replace("{schema}", schema).replace("{row_trigger}", ROW_TRIGGER)
        connection.execute(filled)


def is_filled(connection: Connection, owner: str) -> bool:
    """Is a new row filled by the owner?"""
    try:
        connection.execute("insert into docs (content) values ('text')")
        with acting_as(connection, owner):
            connection.execute("call embed_pending(relation => 'docs')")
    except psycopg.Error:
        connection.execute("reset session authorization")
    return bool(scalar(connection, "select exists (select from docs where embedding is not null)"))


@pytest.mark.parametrize("name", CASES)
def test_status_after_ddl(warm: Connection, owner: str, name: str) -> None:
    case = CASES[name]
    make(warm, owner, case)
    with acting_as(warm, owner):
        warm.execute(DECLARE, [case.mode])
    assert scalar(warm, STATUS, ["docs"]) == "ready"
    try:
        apply(warm, owner, case.statements)
        status = scalar(warm, STATUS, ["docs"])
        assert re.search(case.status, status), status
        ((health, message),) = warm.execute("select status, message from autoembed.columns_health()").fetchall()
        assert health == ("ok" if case.status == "ready" else "warn")
        assert case.status == "ready" or status in message
        assert is_filled(warm, owner) == case.fills
    finally:
        apply(warm, owner, tuple(filter(None, [case.after])))


REFUSED = {
    "rule instead": "rule r rewrites its UPDATEs",
    "target not null": "target column embedding is NOT NULL",
    "default": "target column embedding has a default",
    "key dropped": "it has neither a primary key nor a unique key without nulls",
    "key deferrable": "its key is deferrable",
    "key with nulls": "it has neither a primary key nor a unique key without nulls",
    "key of no scalar": "its key has a type that cannot serve here",
}


@pytest.mark.parametrize("name", [*REFUSED, "published, no identity", "rows hidden", "update revoked", "unlogged"])
def test_declaration_after_ddl(warm: Connection, owner: str, name: str) -> None:
    """What cannot be filled is refused where that is plain for good; else the status has it from the start."""
    case = CASES[name]
    make(warm, owner, case)
    apply(warm, owner, case.statements)
    try:
        with acting_as(warm, owner):
            if name in REFUSED:
                refused = refusal(warm, DECLARE, [case.mode])
                assert REFUSED[name] in str(refused)
                assert refused.diag.message_hint
            else:
                warm.execute(DECLARE, [case.mode])
                assert re.search(case.status, scalar(warm, STATUS, ["docs"]))
    finally:
        apply(warm, owner, tuple(filter(None, [case.after])))


def test_hint_for_a_deferrable_key(warm: Connection) -> None:
    warm.execute("create table docs (a int, b text, content text, embedding vector(32), primary key (a, b) deferrable)")
    refused = refusal(warm, DECLARE, ["deferred"])
    assert "its key is deferrable" in str(refused)
    warm.execute(str(refused.diag.message_hint).partition(": ")[2])
    warm.execute(DECLARE, ["deferred"])
