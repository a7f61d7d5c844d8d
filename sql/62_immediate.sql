-- Immediate mode: statement triggers that embed a statement's new rows in one pass.

-- How many new rows of a statement are embedded at most. Null while this session writes the column's vectors, which is
-- an UPDATE too, and calls the trigger again; and where there is no Python: writes never fail because of it.
create function autoembed.most_new_rows(registration bigint, label text) returns integer
language plpython3u volatile parallel unsafe as $$
if "autoembed 1" not in GD:
    try: plpy.execute("select autoembed.start()")
    except plpy.SPIError as error:
        if getattr(error, "sqlstate", "").startswith("57"): raise
        return plpy.warning("new rows stay pending: the Python package of pg_autoembed does not load")
return GD["autoembed 1"].most_new_rows(registration, label)
$$;

-- Encodes and writes, and says how many of the rows stay pending, why, and whether the next ones would as well. It is
-- open to all, and looks at the caller's rights by itself: autoembed.immediate knows no column where they are too few.
create function autoembed.embed_new(
    relation oid, target name, keys jsonb[], contents text[], hashes bytea[],
    out pending integer, out reason text, out hint text, out is_over boolean, out refusal autoembed.refusal)
language plpython3u volatile parallel unsafe as $$
if "autoembed 1" not in GD: plpy.execute("select autoembed.start()")
return GD["autoembed 1"].embed_new(relation, target, keys, contents, hashes)
$$;

-- When no further piece of a statement is begun: after five seconds, or half of the time that the statement may take.
create function autoembed.immediate_end() returns timestamptz
language sql volatile
begin atomic
    select least(clock_timestamp() + '5 seconds'::interval,
                 case when t.allowed > '0'::interval then statement_timestamp() + t.allowed / 2 end)
    from (select current_setting('statement_timeout')::interval as allowed) t;
end;

-- One word for a statement, whatever became of its rows: a WARNING where some could not be embedded, and a NOTICE where
-- there were only too many.
create function autoembed.say_pending(label text, pending bigint, total bigint, reason text, hint text) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    said text := format('%s: %s of %s new rows %s pending: %s', label, pending, total,
                        case pending when 1 then 'stays' else 'stay' end,
                        coalesce(reason, 'the statement has more of them than there is time for'));
begin
    if reason is null then
        raise notice using message = said, hint = 'The next fill embeds them: call embed_pending, or keep a worker.';
    else
        raise warning using message = said,
            hint = coalesce(hint, 'The next fill tries again; embedding_failures says which rows fail.');
    end if;
end
$$;

-- Immediate mode: the statement's new rows, in pieces of EMBEDDING_IMMEDIATE_ROWS. Never makes the statement fail
-- because a model did. Further pieces are begun while there is time, and what is left then stays pending.
create function autoembed.embed_rows() returns trigger
language plpgsql as $$
declare
    plan record;
    answer record;
    most pg_catalog.int4;
    keys pg_catalog.jsonb[];
    contents pg_catalog.text[];
    hashes pg_catalog.bytea[];
    seen pg_catalog.int8 := 0;
    pending pg_catalog.int8 := 0;
    total pg_catalog.int8;
    reason pg_catalog.text;
    hint pg_catalog.text;
    ends pg_catalog.timestamptz;
begin
    select * into plan from autoembed.immediate(tg_relid, tg_argv[0]::pg_catalog.name);
    if plan.query is null then
        return null;
    end if;
    most := autoembed.most_new_rows(plan.registration, plan.label);
    if most is null then
        return null;
    end if;
    ends := autoembed.immediate_end();
    loop
        begin
            execute plan.query into keys, contents, hashes using most, seen;
            total := seen operator(pg_catalog.+) coalesce(pg_catalog.cardinality(keys), 0);
            if most operator(pg_catalog.=) 0 or pg_catalog.cardinality(keys) operator(pg_catalog.=) most then
                execute plan.counting into total;
            end if;
        exception when others then
            if pg_catalog.left(sqlstate, 2) operator(pg_catalog.=) any ('{25,40,57}'::pg_catalog.text[]) then
                raise;
            end if;
            raise warning '%: new rows stay pending (SQLSTATE %)', plan.label, sqlstate;
            return null;
        end;
        exit when keys is null;
        answer := autoembed.embed_new(tg_relid, tg_argv[0]::pg_catalog.name, keys, contents, hashes);
        perform autoembed.accepted(answer.refusal);
        seen := seen operator(pg_catalog.+) pg_catalog.cardinality(keys);
        pending := pending operator(pg_catalog.+) answer.pending;
        reason := coalesce(reason, answer.reason);
        hint := coalesce(hint, answer.hint);
        exit when seen operator(pg_catalog.>=) total or answer.is_over
            or pg_catalog.clock_timestamp() operator(pg_catalog.>=) ends;
    end loop;
    pending := pending operator(pg_catalog.+) (total operator(pg_catalog.-) seen);
    if pending operator(pg_catalog.>) 0 then
        perform autoembed.say_pending(plan.label, pending, total, reason, hint);
    end if;
    return null;
end
$$;

create function autoembed.may_declare(role oid) returns boolean
language sql stable
begin atomic
    select has_function_privilege(
        role,
        '@extschema@.embed_column(regclass,name[],name,text,text,boolean,text,boolean,boolean,name,text)'::regprocedure,
        'execute');
end;

-- What embed_rows asks for: which registration, and the query over the transition table of the relation that the
-- statement names, the declared one or a partition of it. Nothing where the writer may not write the vector, the column
-- is paused, or the owner was never given embed_column.
create function autoembed.immediate(
    relation oid, target name, out registration bigint, out generation bigint, out model text, out fingerprint text,
    out label text, out dimensions integer, out column_sql text, out query text, out counting text)
returns setof record
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
    r autoembed.registration;
    s autoembed.column_sql;
    new_rows text;
begin
    select g.* into r
    from (select immediate.relation as oid union select p.relid from pg_partition_ancestors(immediate.relation) p) named
    join autoembed.registration g on g.relation = named.oid
    where autoembed.column_name(g.relation, g.target) = immediate.target and g.enabled and g.mode = 'immediate';
    s := autoembed.column_sql_of(r.id);
    if s.relation is null
        or not has_any_column_privilege(s.relation, 'select')
        or not has_table_privilege(s.relation, 'update')
        or not autoembed.may_declare((select c.relowner from pg_class c where c.oid = s.relation)) then
        return;
    end if;
    registration := s.registration;
    generation := s.generation;
    model := s.model;
    fingerprint := s.fingerprint;
    label := s.label;
    dimensions := s.dimensions;
    column_sql := s::text;
    new_rows := format('autoembed_new t where %s and %s collate pg_catalog."C" operator(pg_catalog.~) ''[^[:space:]]''',
                       s.pending, s.content);
    query := format('select pg_catalog.array_agg(c.key), pg_catalog.array_agg(c.content), pg_catalog.array_agg(c.hash)
                     from (select n.key, n.content, autoembed.hash(n.content) as hash
                           from (select %s as key, %s as content from %s limit $1 offset $2) n) c',
                    s.key, s.content, new_rows);
    counting := format('select pg_catalog.count(*) from %s', new_rows);
    return next;
end
$$;

-- Statement triggers fire for the relation that a statement names: so they stand on the declared relation, on its
-- partitions, and on theirs. Of a target that is null: those that name no column of the relation any more.
create function autoembed.statement_triggers(relation oid, target name, out place oid, out name name, out event text)
returns setof record
language sql stable
begin atomic
    select t.tgrelid, t.tgname, case when t.tgtype & 4 = 4 then 'insert' else 'update' end
    from autoembed.family(relation) r (oid)
    join pg_catalog.pg_trigger t on t.tgrelid = r.oid and t.tgfoid = 'autoembed.embed_rows()'::regprocedure
    cross join lateral (select (autoembed.arguments_of(t.oid))[1] as target) named
    where case when statement_triggers.target is not null then named.target = statement_triggers.target::text
               else not exists (select from pg_catalog.pg_attribute a
                                where a.attrelid = t.tgrelid and a.attname::text = named.target
                                  and not a.attisdropped) end;
end;

create function autoembed.missing_statement_triggers(relation oid, target name, out place oid, out event text)
returns setof record
language sql stable
begin atomic
    select r.oid, e.event
    from autoembed.family(relation) r (oid)
    cross join (values ('insert'), ('update')) e (event)
    where not exists (select from autoembed.statement_triggers(r.oid, target) t
                      where t.place = r.oid and t.event = e.event);
end;

create function autoembed.install_statement_triggers(registration bigint) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    r autoembed.registration;
    target name := autoembed.target_name(registration);
    missing record;
    trigger name;
begin
    select * into r from autoembed.registration g where g.id = install_statement_triggers.registration;
    if r.mode <> 'immediate' then
        perform autoembed.drop_statement_triggers(r.relation, target);
        return;
    end if;
    for missing in select * from autoembed.missing_statement_triggers(r.relation, target) loop
        trigger := autoembed.free_trigger_name(
            missing.place, format('~autoembed_%s_%s', autoembed.cut(target, 40), missing.event));
        execute format(
            'create trigger %I after %s on %s referencing new table as autoembed_new
             for each statement execute function autoembed.embed_rows(%L)',
            trigger, missing.event, missing.place::regclass, target);
        execute format('alter trigger %I on %s depends on extension pg_autoembed', trigger, missing.place::regclass);
    end loop;
end
$$;

create function autoembed.drop_statement_triggers(relation oid, target name) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    t record;
begin
    for t in select * from autoembed.statement_triggers(relation, target) loop
        perform autoembed.drop_trigger(t.place, t.name);
    end loop;
end
$$;
