-- Last: who may what. State rows are their relation's owner's: row-level security says so to every reader. Nobody may
-- write them; with SELECT alone no table can be locked against others (see 45_requests.sql).

do $$
declare
    state name;
begin
    foreach state in array array['run', 'failure', 'truncation', 'inflight', 'suspect', 'frontier'] loop
        execute format('alter table autoembed.%I enable row level security', state);
        execute format('grant select on autoembed.%I to public', state);
        execute format(
            'create policy owner on autoembed.%I for select using (registration in (
                 select r.id from autoembed.registration r join pg_catalog.pg_class c on c.oid = r.relation
                 where pg_catalog.pg_has_role(c.relowner, ''usage'')))', state);
    end loop;
end
$$;

grant usage on schema autoembed to public;
grant usage on sequence autoembed.inflight_id_seq to public;
grant insert (registration, action, arguments) on autoembed.request to public;  -- and not role

-- what is declared is no secret, as a table's triggers are none
grant select on autoembed.registration to public;

alter table autoembed.inflight_twin enable row level security;
grant select on autoembed.inflight_twin to public;
create policy owner on autoembed.inflight_twin for select
    using ((registration, id) in (select i.registration, i.id from autoembed.inflight i));

-- A role that may fill without owning must see what is held back, or it would try what crashed the server again and
-- again; but no more rows than it can read in the table anyway.
create policy filler on autoembed.failure for select using (autoembed.reads_all(registration));
create policy filler on autoembed.suspect for select using (autoembed.reads_all(registration));
create policy filler on autoembed.frontier for select using (autoembed.reads_all(registration));

-- These run a model: by GRANT only. docs/reference.md has a recipe for each kind of user.
revoke all on function
    embed(text, text, text), embed(text[], text, text), embed_texts(text[], text, text),
    embed_search(regclass, text, integer, name, jsonb), embed_search(regclass, text[], integer, name, jsonb),
    embed_similar(regclass, jsonb, integer, name, jsonb), embed_duplicates(regclass, double precision, name),
    embed_column(regclass, name[], name, text, text, boolean, text, boolean, boolean, name, text),
    embed_column(regclass, name, name, text, text, boolean, text, boolean, boolean, name, text),
    embed_column_set(regclass, name, text, text, boolean, text, boolean, boolean, text),
        embed_column_drop(regclass, name),
    embed_index(regclass, name, integer, integer, boolean), embed_retry(regclass)
    from public;
revoke all on procedure embed_pending(integer, regclass, bigint, integer, bigint, bigint, bigint, bigint) from public;
revoke all on procedure embed_worker(integer, integer, integer, bigint, bigint, bigint, bigint),
    embed_wait(regclass, interval) from public;
revoke all on function embed_schedule(text, integer, integer), embed_unschedule(), embed_load(text), embed_unload()
    from public;

-- May the caller call the function of the interface around this one in Python? Asked anew each time: the answer changes
-- with SET ROLE.
create function autoembed.may_call(name text) returns boolean
language sql stable
begin atomic
    select case name
        when 'encode_text' then has_function_privilege('embed(text, text, text)'::regprocedure, 'execute')
        when 'encode_texts' then has_function_privilege('embed(text[], text, text)'::regprocedure, 'execute')
                                 or has_function_privilege('embed_texts(text[], text, text)'::regprocedure, 'execute')
        when 'load_model' then has_function_privilege('embed_load(text)'::regprocedure, 'execute')
        when 'unload_models' then has_function_privilege('embed_unload()'::regprocedure, 'execute')
        when 'fill_pending' then has_function_privilege(
            'embed_pending(integer, regclass, bigint, integer, bigint, bigint, bigint, bigint)'::regprocedure,
                'execute')
        when 'fill_on' then has_function_privilege(
            'embed_worker(integer, integer, integer, bigint, bigint, bigint, bigint)'::regprocedure, 'execute')
        when 'wait_for' then has_function_privilege('embed_wait(regclass, interval)'::regprocedure, 'execute')
    end;
end;

grant select on
    embedding_models, embedding_settings, embedding_columns, embedding_progress, embedding_throughput,
        embedding_failures,
    embedding_truncations, embedding_sessions, embedding_health
    to public;
