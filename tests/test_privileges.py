"""Who may what: a matrix by role, state under row-level security, and nobody's code with somebody else's rights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from support.server import Connection, site
from support.talk import TINY, VECTOR, acting_as, column, notices, refusal, scalar

pytest_plugins = ["support.warm"]

REFERENCE = Path(__file__).parents[1] / "docs" / "reference.md"
DOCS = "create table docs (id int primary key, content text, note text, embedding vector(32))"
DECLARE = "select embed_column('docs', 'content', model => 'tiny-mpnet')"
FILL = "call embed_pending(relation => 'docs')"
ROLES = ("nobody", "searcher", "owner", "filler")
INTERFACE = "select p.oid::regprocedure::text from pg_proc p join pg_depend d on d.objid = p.oid and d.deptype = 'e' "
INTERFACE += "join pg_extension e on e.oid = d.refobjid and e.extname = 'pg_autoembed' where p.pronamespace "
ENCODING = {
    "embed(text,text,text)",
    "embed(text[],text,text)",
    "embed_texts(text[],text,text)",
    "embed_search(regclass,text,integer,name,jsonb)",
    "embed_search(regclass,text[],integer,name,jsonb)",
    "embed_similar(regclass,jsonb,integer,name,jsonb)",
    "embed_duplicates(regclass,double precision,name)",
}
DECLARING = {
    "embed_column(regclass,name[],name,text,text,boolean,text,boolean,boolean,name,text)",
    "embed_column(regclass,name,name,text,text,boolean,text,boolean,boolean,name,text)",
    "embed_column_set(regclass,name,text,text,boolean,text,boolean,boolean,text)",
    "embed_column_drop(regclass,name)",
    "embed_index(regclass,name,integer,integer,boolean)",
    "embed_retry(regclass)",
}
FILLING = {"embed_pending(integer,regclass,bigint,integer,bigint,bigint,bigint,bigint)"}
OPERATING = {
    "embed_worker(integer,integer,integer,bigint,bigint,bigint,bigint)",
    "embed_wait(regclass,interval)",
    "embed_schedule(text,integer,integer)",
    "embed_unschedule()",
    "embed_load(text)",
    "embed_unload()",
}
MAY = {
    "nobody": set[str](),
    "searcher": ENCODING,
    "owner": ENCODING | DECLARING | FILLING | OPERATING,
    "filler": FILLING,
}


def recipes() -> list[str]:
    """The GRANTs of docs/reference.md, as its reader copies them."""
    text = REFERENCE.read_text(encoding="utf-8")
    found = re.findall(r"^grant [^;]*embed[^;]*;", text, re.MULTILINE)
    return [statement for statement in found if " on knowledge_base" not in statement]


@pytest.fixture
def cast(warm: Connection, warm_role: Callable[..., str]) -> Connection:
    """The roles with the documented grants; the owner's table docs is declared, one row filled and one pending."""
    for name in ROLES:
        warm_role(name)
    for statement in (*recipes(), "grant searcher to owner"):
        warm.execute(statement)
    with acting_as(warm, "owner"):
        warm.execute(DOCS)
        warm.execute(DECLARE)
        warm.execute(f"insert into docs values (1, 'one', 'n', {VECTOR}), (2, 'two', 'n', null)", [1])
        warm.execute("grant select on docs to searcher")
        warm.execute("grant select, update on docs to filler")
    return warm


def may(connection: Connection, role: str, function: str) -> bool:
    return bool(scalar(connection, "select has_function_privilege(%s, %s::regprocedure, 'execute')", [role, function]))


# --- the matrix ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
def test_functions_of_the_interface(cast: Connection, role: str) -> None:
    functions = column(cast, INTERFACE + "<> 'autoembed'::regnamespace")
    assert {f for f in functions if may(cast, role, f)} == MAY[role]
    assert set(functions) == ENCODING | DECLARING | FILLING | OPERATING


OPEN_IN_PYTHON = {
    # these run no model
    "autoembed.start()",
    "autoembed.find_model(text)",
    "autoembed.list_models()",
    "autoembed.list_settings()",
    "autoembed.list_sessions()",
    "autoembed.list_checks()",
    "autoembed.most_new_rows(bigint,text)",
    # these look at the caller's rights
    "autoembed.encode_text(text,text,text)",
    "autoembed.encode_texts(text[],text,text)",
    "autoembed.load_model(text)",
    "autoembed.unload_models()",
    "autoembed.fill_pending(integer,oid,bigint,integer,bigint,bigint,bigint,bigint,autoembed.refusal)",
    "autoembed.fill_on(integer,integer,integer,bigint,bigint,bigint,bigint,autoembed.refusal)",
    "autoembed.wait_for(oid,text,interval,double precision,autoembed.refusal)",
    "autoembed.embed_new(oid,name,jsonb[],text[],bytea[])",
}
INNER = {
    "select refusal from autoembed.encode_text('a text', 'tiny-mpnet', null)": "embed(text, text, text)",
    "select refusal from autoembed.encode_texts(array['a text'], 'tiny-mpnet', null)": "embed(text[], text, text)",
    "select refusal from autoembed.load_model('tiny-mpnet')": "embed_load(text)",
    "select refusal from autoembed.unload_models()": "embed_unload()",
    "call autoembed.fill_pending(1, null, null, null, 0, 0, 0, 0, null)": "embed_pending",
    "call autoembed.fill_on(1, 0, 1, 0, 0, 0, 0, null)": "embed_worker",
    "call autoembed.wait_for('docs'::regclass, 'docs', '0 s', 0, null)": "embed_wait",
}


@pytest.mark.parametrize("statement", INNER)
def test_inner_functions_ask_for_the_outer_ones_right(cast: Connection, statement: str) -> None:
    """Of the role that calls: what another role of the session may, is not remembered."""
    inner = "select refusal from " if statement.startswith("select") else ""
    for role, allowed in (("owner", True), ("nobody", False), ("owner", True)):
        cast.execute(f"set session authorization {role}")
        *_, refused = next(iter(cast.execute(statement)))
        assert ("permission denied" not in str(refused)) is allowed, (inner, role)
    cast.execute("reset session authorization")


def test_inner_function_of_immediate_mode_serves_those_who_may_write(cast: Connection) -> None:
    with acting_as(cast, "owner"):
        cast.execute("select embed_column_set('docs', 'embedding', mode => 'immediate')")
    key = "array[jsonb_build_array(2)]"
    call = f"select pending from autoembed.embed_new('docs'::regclass, 'embedding', {key}, array['two'], %s)"
    hashes = [scalar(cast, "select array[autoembed.hash('two')]")]
    for role, written in (("nobody", 1), ("searcher", 1), ("owner", 2)):
        cast.execute(f"set session authorization {role}")
        assert scalar(cast, call, hashes) == 0
        cast.execute("reset session authorization")
        assert scalar(cast, "select count(embedding) from docs") == written, role


def test_inner_functions_run_no_model(warm: Connection, warm_role: Callable[..., str]) -> None:
    """What is left to PUBLIC in schema autoembed reads catalogs and state, or asks for rights by itself."""
    warm_role("nobody")
    python = (
        INTERFACE
        + "= 'autoembed'::regnamespace and p.prolang = (select oid from pg_language where lanname = 'plpython3u')"
    )
    open_to_all = {f for f in column(warm, python) if may(warm, "nobody", f)}
    assert open_to_all == OPEN_IN_PYTHON


def test_only_three_triggers_are_security_definer(warm: Connection) -> None:
    definers = (
        "select p.oid::regprocedure::text from pg_proc p join pg_depend d on d.objid = p.oid and d.deptype = 'e' "
    )
    definers += "join pg_extension e on e.oid = d.refobjid and e.extname = 'pg_autoembed' where p.prosecdef order by 1"
    assert column(warm, definers) == ["autoembed.on_ddl()", "autoembed.on_drop()", "autoembed.serve_request()"]
    pinned = "select bool_and(proconfig::text ~ 'search_path=pg_catalog, pg_temp') from pg_proc where prosecdef"
    assert scalar(warm, pinned + " and pronamespace = 'autoembed'::regnamespace") is True


ACTIONS = {
    "embeds a text": ("select embed('text', 'tiny-mpnet') is not null", {"searcher", "owner", "postgres"}),
    "searches": ("select count(*) from embed_search('docs', 'one')", {"searcher", "owner", "postgres"}),
    "declares its own table": (
        "create table more (id int primary key, content text, embedding vector(32)); "
        "select embed_column('more', 'content', model => 'tiny-mpnet')",
        {"owner", "postgres"},
    ),
    "fills": (FILL, {"owner", "filler"}),
    "fills what is its own": ("call embed_pending()", {"owner", "filler", "postgres"}),
    "pauses": ("select embed_column_set('docs', 'embedding', enabled => false)", {"owner", "postgres"}),
    "drops": ("select embed_column_drop('docs')", {"owner", "postgres"}),
    "indexes": ("select embed_index('docs')", {"owner", "postgres"}),
    "retries": ("select embed_retry('docs')", {"owner", "postgres"}),
    "reads columns": ("select * from embedding_columns", {*ROLES, "postgres"}),
    "reads models": ("select * from embedding_models", {*ROLES, "postgres"}),
    "reads settings": ("select * from embedding_settings", {*ROLES, "postgres"}),
    "reads progress": ("select * from embedding_progress", {*ROLES, "postgres"}),
    "reads throughput": ("select * from embedding_throughput", {*ROLES, "postgres"}),
    "reads failures": ("select * from embedding_failures", {*ROLES, "postgres"}),
    "reads truncations": ("select * from embedding_truncations", {*ROLES, "postgres"}),
    "reads health": ("select * from embedding_health", {*ROLES, "postgres"}),
}


@pytest.mark.parametrize("action", ACTIONS)
def test_action_by_role(cast: Connection, action: str) -> None:
    statements, allowed = ACTIONS[action]
    could = set()
    for role in (*ROLES, "postgres"):
        cast.execute("begin") if "call" not in statements else None
        try:
            with acting_as(cast, role):
                for statement in statements.split("; ") if "do $$" not in statements else [statements]:
                    cast.execute(statement)
            could.add(role)
        except psycopg.Error as error:
            assert error.sqlstate == "42501"  # noqa: PT017
        cast.rollback()
        cast.execute("reset session authorization")
    assert could == allowed


def test_ordinary_owner_from_declaration_to_search(cast: Connection, connect: Callable[..., Connection]) -> None:
    """In a session of his own, not by SET ROLE."""
    schema = scalar(cast, "select current_schema()")
    with psycopg.connect(cast.info.dsn, user="owner", autocommit=True) as owner:
        owner.execute(f"set search_path = {schema}, public")
        owner.execute("create table papers (id int primary key, content text, embedding vector(32))")
        owner.execute("select embed_column('papers', 'content', model => 'tiny-mpnet')")
        owner.execute("insert into papers values (1, 'one')")
        assert scalar(owner, "call embed_pending()") == 2
        assert scalar(owner, "select key from embed_search('papers', 'one')") == {"id": 1}
        assert scalar(owner, "select sum(rows) from embedding_throughput") == 2


# --- who fills what ------------------------------------------------------------------------------------------------


def test_superuser_does_not_fill_anothers_table(cast: Connection) -> None:
    """By SET ROLE neither: the owner's trigger could RESET it."""
    for become in ("reset role", "set role owner", "set role filler"):
        cast.execute(become)
        error = refusal(cast, FILL)
        assert error.sqlstate == "42501"
        assert "a superuser does not fill" in str(error.diag.message_primary)
        assert error.diag.message_hint == "Connect as owner."
        assert scalar(cast, "call embed_pending()") == 0
    cast.execute("reset role")
    assert scalar(cast, "select count(embedding) from docs") == 1
    with acting_as(cast, "owner"):
        assert scalar(cast, FILL) == 1


def test_superuser_fills_his_own(cast: Connection) -> None:
    cast.execute("create table own (id int primary key, content text, embedding vector(32))")
    cast.execute("select embed_column('own', 'content', model => 'tiny-mpnet')")
    cast.execute("insert into own values (1, 'one')")
    assert scalar(cast, "call embed_pending()") == 1


def test_partition_of_another_owner(cast: Connection, warm_role: Callable[..., str]) -> None:
    """A partition's triggers are its owner's: the whole tree must be the caller's."""
    cast.execute("create table tree (id int primary key, content text, embedding vector(32)) partition by list (id)")
    cast.execute("create table leaf partition of tree default")
    cast.execute("select embed_column('tree', 'content', model => 'tiny-mpnet')")
    cast.execute("insert into tree values (1, 'one')")
    cast.execute("alter table leaf owner to owner")
    assert scalar(cast, "call embed_pending()") == 0
    assert refusal(cast, "call embed_pending(relation => 'tree')").sqlstate == "42501"


EVIL = """
create function evil(out boolean) language plpgsql as $$
begin
    $1 := true;
    insert into caught values (current_user, session_user, current_setting('is_superuser'));
end
$$"""
HOOKS = {
    "trigger": (
        "create function evil_trigger() returns trigger language plpgsql as 'begin perform evil(); return new; end'",
        "create trigger t before update on docs for each row execute function evil_trigger()",
    ),
    "deferred trigger": (
        "create function evil_trigger() returns trigger language plpgsql as 'begin perform evil(); return new; end'",
        "create constraint trigger t after update on docs deferrable initially deferred "
        "for each row execute function evil_trigger()",
    ),
    "check": ("alter table docs add check (embedding is null or evil()) not valid",),
    "index expression": (
        "create function evil_key(vector) returns boolean language plpgsql immutable as 'begin return evil(); end'",
        "create index on docs (evil_key(embedding)) where note = 'new'",
    ),
    "policy": (
        "alter table docs enable row level security",
        "alter table docs force row level security",
        "create policy p on docs using (evil())",
    ),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_owners_code_never_runs_with_a_superusers_rights(cast: Connection, hook: str) -> None:
    """Whatever a superuser calls: fills, views, changes; the owner's own fill runs it as the owner."""
    cast.execute("create table caught (who name, session name, super text)")
    cast.execute("grant all on caught to public")
    with acting_as(cast, "owner"):
        cast.execute(EVIL)
        for statement in HOOKS[hook]:
            cast.execute(statement)
        cast.execute("insert into docs values (3, 'three', 'new')")
        cast.execute("truncate caught")
    refusal(cast, FILL)
    cast.execute("call embed_pending()")
    for view in ("columns", "progress", "throughput", "failures", "truncations", "health"):
        cast.execute(f"select * from embedding_{view}")
    cast.execute("select embed_retry()")
    cast.execute("select embed_column_set('docs', 'embedding', enabled => true, mode => 'deferred')")
    cast.execute("select * from embed_search('docs', 'one')")
    assert cast.execute("select * from caught").fetchall() == []
    if hook != "policy":
        with acting_as(cast, "owner"):
            cast.execute(FILL)
        assert "owner" in column(cast, "select who from caught")
        assert "on" not in column(cast, "select super from caught")


def test_index_expressions_are_not_planned_with_a_superusers_rights(cast: Connection) -> None:
    """To plan a query over a table is to evaluate what its owner's index expressions make constant."""
    one = "create or replace function one() returns int language plpgsql immutable as $$begin {} return 1; end$$"
    with acting_as(cast, "owner"):
        cast.execute(one.format(""))
        cast.execute("create index on docs ((one() + id))")
        cast.execute(one.format("raise warning 'superuser: %', current_setting('is_superuser');"))
    with notices(cast) as heard:
        cast.execute("select embed_column_set('docs', 'embedding', mode => 'deferred')")
        # what a new model asks for
        clear = "select autoembed.clear(r.id) from autoembed.registration r where r.relation = 'docs'::regclass"
        assert "a superuser does not fill" in str(refusal(cast, clear))
        cast.execute("select embed_column_drop('docs')")
        cast.execute(DECLARE)
    assert "keeps the vectors that it may have already" in str(heard[-1].message)
    assert "superuser: on" not in str(heard)


@pytest.fixture
def evil_cast(cast: Connection) -> Connection:
    """The owner's type whose cast to text runs his function, which leaves a trace of the rights it had."""
    cast.execute("create table caught (who name)")
    cast.execute("grant all on caught to public")
    with acting_as(cast, "owner"):
        cast.execute("create type mood as enum ('fine')")
        cast.execute(
            "create function to_text(mood) returns text language plpgsql as "
            "$$ begin insert into caught values (current_user); return 'text'; end $$"
        )
        cast.execute("create cast (mood as text) with function to_text(mood)")
        cast.execute("create table moods (id int primary key, content mood, embedding vector(32))")
        cast.execute("insert into moods values (1, 'fine')")
    return cast


@pytest.mark.parametrize("how", ["trigger", "insert"])
def test_smuggled_declaration_runs_nothing_in_the_views(evil_cast: Connection, how: str) -> None:
    """A hand-made trigger, or a hand-made row of state, declares what embed_column would refuse."""
    arguments = f"'embedding', '{TINY}', '', 'deferred', 'true', '{{}}', 'content'"
    smuggle = {
        "trigger": "create trigger smuggled before update on moods for each row "
        f"execute function autoembed.invalidate({arguments})",
        "insert": "insert into autoembed.registration (relation, target, sources, model, fingerprint, mode) "
        f"values ('moods'::regclass, 3, '{{2}}', '{TINY}', '', 'deferred')",
    }
    with acting_as(evil_cast, "owner"):
        try:
            evil_cast.execute(smuggle[how])
        except psycopg.Error:
            return
    for view in ("columns", "progress", "throughput", "failures", "truncations", "health"):
        try:
            evil_cast.execute(f"select * from embedding_{view}")
        except psycopg.Error as error:
            pytest.fail(f"embedding_{view} is broken for everybody: {error}")
    assert column(evil_cast, "select who from caught") == []


def test_policy_does_not_run_for_readers_of_the_views(cast: Connection) -> None:
    """Whoever looks at all columns' progress must not run a policy of a stranger's table with his own rights."""
    cast.execute("create table caught (who name, session name, super text)")
    cast.execute("grant all on caught to public")
    with acting_as(cast, "owner"):
        cast.execute(EVIL)
        cast.execute("alter table docs enable row level security")
        cast.execute("create policy p on docs using (evil())")
        cast.execute("grant select on docs to public")
    with acting_as(cast, "nobody"):
        cast.execute("select * from embedding_progress; select * from embedding_health")
    assert column(cast, "select who from caught") == []


def test_declaration_without_the_right_embeds_nothing(cast: Connection) -> None:
    """A role that was never given embed_column makes the triggers by hand: no model runs for it."""
    with acting_as(cast, "nobody"):
        cast.execute("create table mine (id int primary key, content text, embedding vector(32))")
        fingerprint = scalar(cast, "select fingerprint from embedding_models where name = 'tiny-mpnet'")
        arguments = f"'embedding', '{TINY}', '{fingerprint}', 'immediate', 'true', '{{}}', 'content'"
        cast.execute(
            f"create trigger a before update on mine for each row execute function autoembed.invalidate({arguments})"
        )
        cast.execute(
            "create trigger b after insert on mine referencing new table as autoembed_new "
            "for each statement execute function autoembed.embed_rows('embedding')"
        )
        cast.execute("insert into mine values (1, 'one')")
        assert scalar(cast, "select embedding is null from mine")


# --- a role with UPDATE alone --------------------------------------------------------------------------------------


def test_filler_fills_and_leaves_no_record(cast: Connection) -> None:
    with acting_as(cast, "filler"):
        assert scalar(cast, FILL) == 1
        assert scalar(cast, "call embed_pending()") == 0
    for state in ("run", "failure", "inflight", "suspect", "truncation"):
        assert scalar(cast, f"select count(*) from autoembed.{state}") == 0


STATE_ROWS = {
    "failure": "(registration, key, hash, kind, message) select id, '[2]', sha256('two'), 'encoder', 'm'",
    "suspect": "(registration, key, hash) select id, '[2]', sha256('two')",
    "truncation": "(registration, key, tokens, token_limit) select id, '[2]', 9, 8",
    "inflight": "(registration, id, cluster, alone, keys, hashes) "
    "select id, 1, 'c', false, array['[2]'::jsonb], array['\\x'::bytea]",
    "frontier": "(registration, key, beyond, held) select id, '[2]', 'b', true",
    "run": "(registration, model, embedded, failed, skipped, tokens, claim_seconds, encode_seconds, write_seconds) "
    "select id, 'm', 1, 0, 0, 1, 1, 1, 1",
}


@pytest.fixture
def recorded(cast: Connection) -> Connection:
    """A row of each state stands for the owner's table; another table of the owner's is not declared."""
    with acting_as(cast, "owner"):
        cast.execute("create table spare (id int primary key, content text, embedding vector(32))")
    for state, row in STATE_ROWS.items():
        cast.execute(f"insert into autoembed.{state} {row} from autoembed.registration")
    return cast


def read_state(connection: Connection) -> dict[str, list[str]]:
    tables = ("registration", *STATE_ROWS)
    return {state: column(connection, f"select s::text from autoembed.{state} s order by 1") for state in tables}


@pytest.mark.parametrize("state", STATE_ROWS)
def test_state_rows_by_role(recorded: Connection, state: str) -> None:
    """Written by nobody; read by the owner, and at most by who reads the whole table anyway."""
    for role in ROLES:
        with acting_as(recorded, role):
            for statement in (
                f"insert into autoembed.{state} {STATE_ROWS[state]} from autoembed.registration",
                f"update autoembed.{state} set registration = registration",
                f"delete from autoembed.{state}",
            ):
                assert refusal(recorded, statement).sqlstate == "42501"
            sees = role == "owner" or (role == "filler" and state in ("failure", "suspect", "frontier"))
            assert scalar(recorded, f"select count(*) from autoembed.{state}") == sees


STRONGER = ("row share", "row exclusive", "share", "share row exclusive", "exclusive", "access exclusive")


def test_no_role_can_lock_what_others_need(cast: Connection) -> None:
    """A lock on a table of state would stop every fill and every ALTER TABLE of the database."""
    relations = column(
        cast,
        "select c.oid::regclass from pg_class c join pg_depend d on d.objid = c.oid and d.deptype = 'e' "
        "where c.relkind in ('r', 'v') and d.refobjid = (select oid from pg_extension where extname = 'pg_autoembed')",
    )
    assert {"autoembed.registration", "autoembed.request", "embedding_progress"} <= set(relations)
    for role in ("nobody", "owner"):
        with acting_as(cast, role):
            for relation in relations:
                for mode in STRONGER:
                    lock = f"do $$ begin lock table {relation} in {mode} mode; end $$"
                    assert refusal(cast, lock).sqlstate == "42501", (relation, mode)


# --- requests, the one door to state ---------------------------------------------------------------------------------

ARGUMENTS = """{
    "id": 77, "inflight": 1, "alone": true, "keys": [[2]], "hashes": ["00"], "handled": [[2]], "written": [[2]],
    "failures": [{"key": [2], "hash": "00", "kind": "crashed", "message": "m"}],
    "truncations": [{"key": [2], "tokens": 9, "limit": 8}],
    "figures": {"tokens": 1, "claim": 1, "encode": 1, "write": 1},
    "key": [9], "beyond": "b", "held": true, "failure": [{"key": [2], "there": false}], "truncation": null,
    "relation": "%s", "target": 3, "sources": [2], "model": "m", "fingerprint": "f", "mode": "immediate",
    "enabled": false, "options": {}, "row_trigger": null, "reset": true, "oid": 9
}"""
REQUEST = "insert into autoembed.request (registration, action, arguments) "


def requests(connection: Connection) -> list[str]:
    """A request of each action that the trigger serves, all of them for the owner's table."""
    source = scalar(connection, "select prosrc from pg_proc where oid = 'autoembed.serve_request()'::regprocedure")
    actions = re.findall(r"when '([a-z ]+)' then", source)
    assert {"settle", "retry"} <= set(actions)
    known = ARGUMENTS % scalar(connection, "select 'spare'::regclass::oid")
    arguments = {action: "[[2]]" if action == "drop suspects" else known for action in actions}
    return [
        f"{REQUEST} select id, '{action}', '{arguments[action]}' from autoembed.registration "
        "where relation = 'docs'::regclass"
        for action in actions
    ]


@pytest.mark.parametrize("role", ["filler", "nobody", "searcher"])
def test_request_for_anothers_table_changes_nothing(recorded: Connection, role: str) -> None:
    before = read_state(recorded)
    for request in requests(recorded):
        with acting_as(recorded, role):
            recorded.execute(request)
        assert read_state(recorded) == before, request
    for request in requests(recorded):  # and they would change something, were they the owner's
        with acting_as(recorded, "owner"), recorded.transaction(force_rollback=True):
            recorded.execute(request)
            assert read_state(recorded) != before, request


def test_role_of_a_request_cannot_be_chosen(recorded: Connection) -> None:
    before = read_state(recorded)
    with acting_as(recorded, "filler"):
        for statement in (
            "insert into autoembed.request (role, registration, action, arguments) select 'owner', id, 'retry', '{}' "
            "from autoembed.registration",
            "insert into autoembed.request select 'owner', id, 'retry', '{}' from autoembed.registration",
            "copy autoembed.request from stdin",
            "update autoembed.request set role = 'owner'",
            "create trigger t before insert on autoembed.request for each row execute function suppress_redundant()",
            "alter table autoembed.request alter column role set default 'owner'",
            "select * from autoembed.request",
        ):
            assert refusal(recorded, statement).sqlstate == "42501", statement
        # a view has defaults of its own, which need no right to the column
        recorded.execute("create temp view way_in as select * from autoembed.request")
        recorded.execute("alter view way_in alter column role set default 'owner'")
        recorded.execute(
            "insert into way_in (registration, action, arguments) select id, 'retry', '{}' from autoembed.registration"
        )
    assert read_state(recorded) == before


def test_request_is_of_the_role_whose_code_makes_it(recorded: Connection) -> None:
    """Where a superuser's ANALYZE evaluates a stranger's index expression, the stranger asks; neither by the role that
    calls a function of the owner's that has the owner's rights."""
    request = f"{REQUEST} select id, 'retry', '{{}}' from autoembed.registration"
    with acting_as(recorded, "nobody"):
        recorded.execute("create table mine (id int primary key)")
        recorded.execute(f"create function ask(out int) language plpgsql as $$ begin {request}; $1 := 1; end $$")
        # from PostgreSQL 17 on, ANALYZE and REINDEX have a path of their own
        path = "set search_path from current"
        body = "begin return ask(); end"
        recorded.execute(f"create function key(int) returns int language plpgsql immutable {path} as '{body}'".encode())
        recorded.execute("create index on mine (key(id))")
        recorded.execute("insert into mine values (1)")
    recorded.execute("reindex table mine")
    recorded.execute("analyze mine")
    assert scalar(recorded, "select count(*) from autoembed.failure") == 1
    with acting_as(recorded, "owner"):
        body = f"security definer as $$ begin {request}; end $$"
        recorded.execute(f"create function ask_for_me() returns void language plpgsql {body}")
        recorded.execute("grant execute on function ask_for_me() to nobody")
    with acting_as(recorded, "nobody"):
        recorded.execute("select ask_for_me()")
    assert scalar(recorded, "select count(*) from autoembed.failure") == 0


HIJACKS = (
    "create function trace() returns boolean {}",
    "create temp view pg_class as select * from pg_catalog.pg_class where trace()",
    "create temp view pg_roles as select * from pg_catalog.pg_roles where trace()",
    "create function pg_temp.pg_has_role(name, oid, text) returns boolean {}",
    "create function pg_has_role(name, oid, text) returns boolean {}",
    "create function jsonb_array_length(jsonb) returns int {}",
    "create function decode(text, text) returns bytea {}",
    "create function same(bigint, bigint) returns boolean {}",
    "create function same(jsonb, jsonb) returns boolean {}",
    "create operator = (leftarg = bigint, rightarg = bigint, function = same)",
    "create operator = (leftarg = jsonb, rightarg = jsonb, function = same)",
    "create type wish as enum ('fine')",
    "create function of_wish(wish) returns jsonb {}",
    "create cast (wish as jsonb) with function of_wish(wish) as assignment",
)


def test_definer_runs_nobodys_code(recorded: Connection) -> None:
    """Whatever the asker puts on the path, in the way of temporary objects, or behind a cast."""
    recorded.execute("create table caught (who name)")
    recorded.execute("grant all on caught to public")
    schema = scalar(recorded, "select current_schema()")
    evil = f"insert into {schema}.caught values (current_user); return null"
    asked = requests(recorded)
    with acting_as(recorded, "owner"):
        for hijack in HIJACKS:
            recorded.execute(hijack.replace("{}", f"language plpgsql as $$ begin {evil}; end $$"))
        recorded.execute(f"set search_path = pg_temp, {schema}, pg_catalog, public")
        for request in asked:
            recorded.execute(request)
        assert column(recorded, f"select who from {schema}.caught") == []  # the hijacks' own operators aside
        recorded.execute(f"{REQUEST} values (1, 'retry', 'fine'::{schema}.wish)")
        recorded.execute(f"set search_path = {schema}, public")
        recorded.execute("discard temp")
    assert column(recorded, "select who from caught") == ["owner"]  # the cast is the asker's own


def test_owner_makes_no_other_fill_fail(recorded: Connection, warm_role: Callable[..., str]) -> None:
    """By no made-up number: ids are drawn by the server, or stand behind the registration's own."""
    warm_role("other")
    for statement in recipes():
        recorded.execute(statement.replace("to owner", "to other").replace("to searcher", "to other"))
    with acting_as(recorded, "other"):
        recorded.execute("create table others (id int primary key, content text, embedding vector(32))")
        recorded.execute("select embed_column('others', 'content', model => 'tiny-mpnet')")
        recorded.execute("insert into others select g, 'text ' || g from generate_series(1, 4) g")
    with acting_as(recorded, "owner"):
        drawn = scalar(recorded, "select nextval('autoembed.inflight_id_seq')")
        for number in range(drawn, drawn + 5):
            flight = ARGUMENTS.replace('"id": 77', f'"id": {number}')
            recorded.execute(f"{REQUEST} select id, 'record inflight', %s from autoembed.registration", [flight])
        for request in requests(recorded):
            recorded.execute(request)
    with acting_as(recorded, "other"):
        assert scalar(recorded, "call embed_pending(2)") == 4
        recorded.execute("create table more (id int primary key, content text, embedding vector(32))")
        recorded.execute("select embed_column('more', 'content', model => 'tiny-mpnet')")


def test_filler_cannot_park_rows(cast: Connection) -> None:
    """By no inner function either: the row stays pending and the owner's fill takes it."""
    registration = scalar(cast, "select id from autoembed.registration")
    shape = scalar(cast, "select autoembed.column_sql_of(%s)::text", [registration])
    with acting_as(cast, "filler"):
        refusal(cast, "select autoembed.fail(%s, '[2]', sha256('two'), 'crashed', 'm')", [registration])
        cast.execute(
            "select autoembed.record_inflight("
            "%s::autoembed.column_sql, 1, true, array['[2]'::jsonb], array[sha256('two')])",
            [shape],
        )
        cast.execute("select autoembed.recover(%s)", [registration])
    with acting_as(cast, "owner"):
        assert scalar(cast, FILL) == 1


def test_filler_behind_a_policy_reads_no_failures(cast: Connection) -> None:
    cast.execute(f"insert into autoembed.failure {STATE_ROWS['failure']} from autoembed.registration")
    with acting_as(cast, "owner"):
        cast.execute("alter table docs enable row level security")
        cast.execute("create policy few on docs to filler using (id = 1)")
    with acting_as(cast, "filler"):
        assert scalar(cast, "select count(*) from embedding_failures") == 0
        assert scalar(cast, "select count(*) from autoembed.suspect") == 0
    with acting_as(cast, "owner"):
        assert cast.execute("select key, kind from embedding_failures").fetchall() == [({"id": 2}, "encoder")]


def test_progress_shows_no_table_that_the_reader_cannot_read(cast: Connection) -> None:
    with acting_as(cast, "nobody"):
        assert column(cast, "select relation from embedding_progress") == []
    with acting_as(cast, "searcher"):
        assert cast.execute("select relation::text, exact from embedding_progress").fetchall() == [("docs", False)]
    with acting_as(cast, "owner"):
        assert cast.execute("select total, pending, exact from embedding_progress").fetchall() == [(2, 1, True)]


def test_filler_without_the_column_is_refused(cast: Connection) -> None:
    with acting_as(cast, "owner"):
        cast.execute("revoke update on docs from filler")
        cast.execute("grant update (note) on docs to filler")
    with acting_as(cast, "filler"):
        assert refusal(cast, FILL).sqlstate == "42501"
    assert scalar(cast, "select count(embedding) from docs") == 1


# --- sessions, paths -----------------------------------------------------------------------------------------------


def test_set_role_gains_nothing(cast: Connection) -> None:
    """The model is loaded and the session warm: rights are asked anew for whoever calls now."""
    with acting_as(cast, "owner"):
        assert scalar(cast, FILL) == 1
        cast.execute("update docs set content = 'changed' where id = 1")
    with acting_as(cast, "nobody"):
        for statement in (
            FILL,
            "call embed_pending()",
            "select embed('text')",
            "select * from embed_search('docs', 'x')",
        ):
            assert refusal(cast, statement).sqlstate == "42501"
    with acting_as(cast, "filler"):
        assert scalar(cast, "call embed_pending()") == 0
    assert refusal(cast, FILL).sqlstate == "42501"
    assert scalar(cast, "select count(embedding) from docs") == 1


def test_role_that_inherits_the_owner(cast: Connection, warm_role: Callable[..., str]) -> None:
    """A member reads and manages; without a name embed_pending serves only what the role itself owns."""
    warm_role("member")
    cast.execute("grant owner to member")
    with acting_as(cast, "member"):
        assert scalar(cast, "call embed_pending()") == 0
        assert scalar(cast, FILL) == 1
        assert scalar(cast, "select sum(rows) from embedding_throughput") == 1


def test_another_embed_pending_on_the_path(cast: Connection) -> None:
    cast.execute("create table caught (who name)")
    with acting_as(cast, "owner"):
        for signature in ("batch int", "batch int, relation regclass"):
            body = "language sql as 'insert into caught values (current_user)'"
            cast.execute(f"create procedure embed_pending({signature}) {body}")
    with acting_as(cast, "owner"):
        call = "call public.embed_pending(batch => 32, relation => null, max_rows => null, max_seconds => null, "
        assert scalar(cast, call + "embedded => 0, failed => 0, skipped => 0)") == 1
    assert column(cast, "select who from caught") == []


EVIL_NAMES = (
    "function format(text, variadic text[]) returns text",
    "function octet_length(text) returns int",
    "function sha256(bytea) returns bytea",
    "function array_agg(jsonb) returns jsonb[]",
    "function jsonb_build_array(int) returns jsonb",
    "function coalesce_(int) returns int",
    "function concat_ws(text, text, text) returns text",
    "function count(text) returns bigint",
    "function unnest(jsonb[]) returns setof jsonb",
    "function nextval(regclass) returns bigint",
)


def test_functions_on_the_path_are_not_called(cast: Connection) -> None:
    """Schemas before pg_catalog on the caller's path: the product calls neither their functions nor their operators."""
    schema = scalar(cast, "select current_schema()")
    cast.execute("create table caught (who name)")
    cast.execute("grant all on caught to public")
    body = "language plpgsql as 'begin insert into caught values (current_user); return null; end'"
    setof = "language plpgsql as 'begin insert into caught values (current_user); end'"
    for name in EVIL_NAMES:
        cast.execute(f"create {name} {setof if 'setof' in name else body}")
    cast.execute(f"create function same(int, int) returns boolean {body}")
    for operator in ("=", ">", "<"):
        cast.execute(f"create operator {operator} (leftarg = int, rightarg = int, function = same)")
    with acting_as(cast, "owner"):
        cast.execute(f"set search_path = {schema}, pg_catalog, public")
        assert scalar(cast, FILL) == 1
        cast.execute("select * from embed_search('docs', 'one')")
        cast.execute("select * from embedding_progress")
        cast.execute("update docs set content = 'changed'")
    assert column(cast, "select who from caught") == []


def test_package_comes_from_the_site_whatever_the_path(cast: Connection, connect: Callable[..., Connection]) -> None:
    """A package of the same name where the session's Python would look first is not the one that runs."""
    where = """
    create function autoembed_file() returns text language plpython3u as $$
    import sys
    return sys.modules["autoembed"].__file__ + " " + sys.path[0]
    $$"""
    cast.execute(where)
    package, first = scalar(cast, "select autoembed_file()").split()
    assert Path(package).is_relative_to(site())
    assert Path(first).is_relative_to(site())
    assert not [m for m in (package, first) if "site-packages" not in m]


@pytest.fixture(autouse=True)
def back_to_oneself(warm_session: Connection) -> Iterator[None]:
    yield
    warm_session.rollback()
    warm_session.execute("reset session authorization")


def test_notices_name_no_text(cast: Connection) -> None:
    with notices(cast) as heard, acting_as(cast, "owner"):
        cast.execute("insert into docs values (7, 'a secret text')")
        cast.execute(FILL)
    assert not [n for n in heard if "secret" in f"{n.message} {n.hint}"]
