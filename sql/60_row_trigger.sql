-- Triggers on users' tables, and the event triggers that keep them and the registrations together.

-- Text changed: the vector goes, in the same write, unless the writer brought a new one. So no row ever carries
-- another text's vector. The when-condition has compared the texts already.
-- Arguments: target, model, fingerprint, mode, enabled, source, …: the whole registration (see 10_state.sql).
create function autoembed.invalidate() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
    kept boolean;
begin
    -- fails where the column is missing: better than a stale vector
    execute format('select record_image_eq(row(($1).%1$I), row(($2).%1$I)) and ($2).%1$I is not null', tg_argv[0])
    into kept using old, new;
    if kept then
        new := jsonb_populate_record(new, jsonb_build_object(tg_argv[0], null));
    end if;
    return new;
end
$$;

-- Immediate mode: the statement's new rows in one pass. Never makes the statement fail because a model did.
create function autoembed.embed_rows() returns trigger
language plpython3u as $$
if "autoembed 1" not in GD:
    try: plpy.execute("select autoembed.start()")
    except plpy.SPIError as error:
        if getattr(error, "sqlstate", "").startswith("57"): raise
        return plpy.warning("new rows stay pending: the Python package of pg_autoembed does not load")
GD["autoembed 1"].embed_rows(int(TD["relid"]), TD["args"][0])
$$;

-- What embed_rows asks for: which registration, and the query over the transition table. Nothing where the writer may
-- not write the vector, the column is paused, or the owner was never given embed_column.
create function autoembed.immediate(
    relation oid, target name, out registration bigint, out generation bigint, out model text, out fingerprint text,
    out label text, out dimensions integer, out shape text, out query text)
returns setof record
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
    r autoembed.registration;
    s autoembed.shape;
begin
    select g.* into r
    from autoembed.registration g
    where g.relation = immediate.relation and autoembed.column_name(g.relation, g.target) = immediate.target
      and g.enabled and g.mode = 'immediate';
    s := autoembed.shape_of(r.id);
    if s.relation is null
        or not has_any_column_privilege(s.relation, 'select')
        or not has_table_privilege(s.relation, 'update')
        or not has_function_privilege((select c.relowner from pg_class c where c.oid = s.relation),
                                      '@extschema@.embed_column(regclass, name[], name, text, text, boolean)', 'execute') then
        return;
    end if;
    registration := s.registration;
    generation := s.generation;
    model := s.model;
    fingerprint := s.fingerprint;
    label := s.label;
    dimensions := s.dimensions;
    shape := s::text;
    query := format('select %s as key, %s as content, autoembed.hash(%2$s) as hash from autoembed_new t
                     where %s and %2$s collate pg_catalog."C" operator(pg_catalog.~) ''[^[:space:]]''',
                    s.key, s.content, s.pending);
    return next;
end
$$;

create function autoembed.trigger_arguments(registration bigint) returns text[]
language sql stable
begin atomic
    select array[a.attname::text, r.model, r.fingerprint, r.mode, r.enabled::text]
           || autoembed.column_names(r.relation, r.sources)::text[]
    from autoembed.registration r
    join pg_catalog.pg_attribute a on a.attrelid = r.relation and a.attnum = r.target
    where r.id = registration;
end;

-- tgargs holds the arguments as bytes, each ended by a zero
create function autoembed.arguments_of(trigger oid) returns text[]
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
    rest bytea := (select t.tgargs from pg_trigger t where t.oid = trigger);
    arguments text[] := '{}';
    size integer;
begin
    while length(rest) > 0 loop
        size := position(decode('00', 'hex') in rest);
        arguments := arguments || convert_from(substring(rest for size - 1), getdatabaseencoding());
        rest := substring(rest from size + 1);
    end loop;
    return arguments;
end
$$;

-- A trigger with a column list costs nothing when another column is updated; without one, it must compare the texts
-- of each updated row, toasted or not. But a row trigger of the user's own may change the text behind the list's
-- back: where there is one, on the table or a partition, ours has no list.
create function autoembed.needs_every_update(relation oid) returns boolean
language sql stable
begin atomic
    select exists (
        select from pg_catalog.pg_trigger t
        where (t.tgrelid = relation or t.tgrelid in (select p.relid from pg_catalog.pg_partition_tree(relation) p))
          and not t.tgisinternal and t.tgtype & 19 = 19  -- before, each row, update
          and t.tgfoid <> 'autoembed.invalidate()'::regprocedure);
end;

-- The registration's own trigger. By its oid, which outlives renaming; but pg_upgrade gives it another one.
create function autoembed.row_trigger(r autoembed.registration) returns oid
language sql stable
begin atomic
    select t.oid
    from pg_catalog.pg_trigger t
    where t.tgrelid = (r).relation and t.tgfoid = 'autoembed.invalidate()'::regprocedure
      and (t.oid = (r).row_trigger
           or (autoembed.arguments_of(t.oid))[1] = autoembed.column_name((r).relation, (r).target)::text
           or not exists (select from pg_catalog.pg_attribute a  -- the column was renamed since pg_upgrade
                          where a.attrelid = t.tgrelid and a.attname::text = (autoembed.arguments_of(t.oid))[1]))
    order by t.oid = (r).row_trigger desc nulls last,
             (autoembed.arguments_of(t.oid))[1] = autoembed.column_name((r).relation, (r).target)::text desc
    limit 1;
end;

-- The greatest name of the user's own row triggers before update, on the table or a partition: ours must be greater,
-- since they fire in the order of their names.
create function autoembed.last_trigger(relation oid) returns text
language sql stable
begin atomic
    select max(t.tgname::text collate "C")
    from pg_catalog.pg_trigger t
    where (t.tgrelid = relation or t.tgrelid in (select p.relid from pg_catalog.pg_partition_tree(relation) p))
      and not t.tgisinternal and t.tgtype & 19 = 19
      and t.tgfoid <> 'autoembed.invalidate()'::regprocedure;
end;

create function autoembed.fires_last(r autoembed.registration) returns boolean
language sql stable
begin atomic
    select coalesce(t.tgname::text collate "C" > autoembed.last_trigger((r).relation) collate "C", true)
    from pg_catalog.pg_trigger t where t.oid = autoembed.row_trigger(r);
end;

create function autoembed.install(registration bigint) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
    perform autoembed.install_row_trigger(registration);
    perform autoembed.install_statement_triggers(registration);
    perform autoembed.install_pending_index(registration);
end
$$;

create function autoembed.install_row_trigger(registration bigint) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    r autoembed.registration;
    sources name[];
    trigger name;
begin
    select * into r from autoembed.registration g where g.id = install_row_trigger.registration;
    sources := autoembed.column_names(r.relation, r.sources);
    trigger := autoembed.name_row_trigger(r);
    execute format(
        'create or replace trigger %I before update %s on %s for each row when (%s) execute function autoembed.invalidate(%s)',
        trigger,
        case when not autoembed.needs_every_update(r.relation)
            then 'of ' || (select string_agg(quote_ident(u), ', ') from unnest(sources) u) end,
        r.relation::regclass,
        (select string_agg(format('(old.%1$I)::text collate "C" is distinct from (new.%1$I)::text collate "C"', u), ' or ')
         from unnest(sources) u),
        (select string_agg(quote_literal(u), ', ' order by n)
         from unnest(autoembed.trigger_arguments(registration)) with ordinality as a (u, n)));
    -- also where session_replication_role is replica: a subscriber's vectors go stale like anybody's
    execute format('alter table %s enable always trigger %I', r.relation::regclass, trigger);
    execute format('alter trigger %I on %s depends on extension pg_autoembed', trigger, r.relation::regclass);
    update autoembed.registration g
    set row_trigger = (select t.oid from pg_trigger t where t.tgrelid = r.relation and t.tgname = trigger)
    where g.id = r.id;
end
$$;

-- '~' sorts behind all ascii letters; where a user's trigger sorts behind that, ours takes its name and adds one more.
-- Renames the trigger that is there already.
create function autoembed.name_row_trigger(r autoembed.registration) returns name
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    former name := (select t.tgname from pg_trigger t where t.oid = autoembed.row_trigger(r));
    last text := autoembed.last_trigger(r.relation);
    wanted name := coalesce(former, autoembed.free_trigger_name(
        r.relation, '~autoembed_' || autoembed.column_name(r.relation, r.target)));
begin
    if wanted::text collate "C" <= last collate "C" then
        if octet_length(last) > 58 then
            perform autoembed.refuse(r.relation, format('no trigger can fire after %I', last), 'Give that trigger a shorter name.');
        end if;
        wanted := autoembed.free_trigger_name(r.relation, last || '~');
    end if;
    if former <> wanted then
        execute format('alter trigger %I on %s rename to %I', former, r.relation::regclass, wanted);
    end if;
    return wanted;
end
$$;

create function autoembed.target_name(registration bigint) returns name
language sql stable
begin atomic
    select autoembed.column_name(r.relation, r.target) from autoembed.registration r where r.id = registration;
end;

create function autoembed.free_trigger_name(relation oid, wanted text) returns name
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
    candidate name := autoembed.cut(wanted, 63);
    n integer := 1;
begin
    while exists (select from pg_trigger t where t.tgrelid = relation and t.tgname = candidate) loop
        n := n + 1;
        candidate := autoembed.cut(wanted, 58) || n;
    end loop;
    return candidate;
end
$$;

create function autoembed.statement_triggers(relation oid, target name) returns setof name
language sql stable
begin atomic
    select t.tgname
    from pg_catalog.pg_trigger t
    where t.tgrelid = relation and t.tgfoid = 'autoembed.embed_rows()'::regprocedure
      and (autoembed.arguments_of(t.oid))[1] = target::text;
end;

create function autoembed.install_statement_triggers(registration bigint) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    r autoembed.registration;
    target name := autoembed.target_name(registration);
    trigger name;
    event text;
begin
    select * into r from autoembed.registration g where g.id = install_statement_triggers.registration;
    for trigger in select * from autoembed.statement_triggers(r.relation, target) loop
        execute format('drop trigger %I on %s', trigger, r.relation::regclass);
    end loop;
    if r.mode <> 'immediate' then
        return;
    end if;
    foreach event in array array['insert', 'update'] loop
        trigger := autoembed.free_trigger_name(r.relation, format('~autoembed_%s_%s', autoembed.cut(target, 40), event));
        execute format(
            'create trigger %I after %s on %s referencing new table as autoembed_new for each statement execute function autoembed.embed_rows(%L)',
            trigger, event, r.relation::regclass, target);
        execute format('alter trigger %I on %s depends on extension pg_autoembed', trigger, r.relation::regclass);
    end loop;
end
$$;

create function autoembed.free_index_name(relation oid, target name, purpose text) returns name
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
    home name;
    stem text;
    candidate name;
    n integer := 1;
begin
    select s.nspname, autoembed.cut(c.relname, 29) || '_' || autoembed.cut(target, 20) || '_' || purpose into home, stem
    from pg_class c join pg_namespace s on s.oid = c.relnamespace where c.oid = relation;
    candidate := stem;
    while to_regclass(format('%I.%I', home, candidate)) is not null loop
        n := n + 1;
        candidate := stem || n;
    end loop;
    return candidate;
end
$$;

-- The pending rows in key order. least() of one column is that column; it is there so that an order by it can be served
-- by this index alone: with old statistics the planner would walk the primary key past all rows that are filled.
create function autoembed.install_pending_index(registration bigint) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    s autoembed.shape := autoembed.shape_of(registration);
    target name := autoembed.target_name(registration);
    place name := (select n.nspname from pg_class c join pg_namespace n on n.oid = c.relnamespace where c.oid = s.relation);
    index name;
begin
    if autoembed.has_pending_index(s.relation, s.target_number) then
        return;
    end if;
    perform autoembed.drop_pending_index(s.relation, s.target_number);  -- of a former key
    index := autoembed.free_index_name(s.relation, target, 'pending');
    execute format('create index %I on %s (%s) where %s', index, s.name,
                   (select string_agg(format(case k.n when 1 then '(least(%I))' else '%I' end, u), ', ' order by k.n)
                    from unnest(s.key_names) with ordinality as k (u, n)),
                   autoembed.pending_condition('', target, s.sources));
    execute format('alter index %I.%I depends on extension pg_autoembed', place, index);
end
$$;

create function autoembed.pending_indexes(relation oid, target smallint) returns setof oid
language sql stable
begin atomic
    select i.indexrelid
    from pg_catalog.pg_index i
    join pg_catalog.pg_depend x on x.classid = 'pg_class'::regclass and x.objid = i.indexrelid and x.deptype = 'x'
    join pg_catalog.pg_extension e on e.oid = x.refobjid and e.extname = 'pg_autoembed'
    where i.indrelid = relation and i.indpred is not null
      and exists (select from pg_catalog.pg_depend c
                  where c.classid = 'pg_class'::regclass and c.objid = i.indexrelid
                    and c.refclassid = 'pg_class'::regclass and c.refobjid = relation and c.refobjsubid = target);
end;

create function autoembed.has_pending_index(relation oid, target smallint) returns boolean
language sql stable
begin atomic
    select exists (
        select from autoembed.pending_indexes(relation, target) p
        join pg_catalog.pg_index i on i.indexrelid = p and i.indisvalid
        where pg_get_indexdef(p, 1, false) = (
                select format('LEAST(%I)', c.name) from autoembed.key_columns(relation) c where c.position = 0)
          and (i.indkey::smallint[])[1 : i.indnkeyatts - 1] = (
                select (k.indkey::smallint[])[1 : k.indnkeyatts - 1] from pg_catalog.pg_index k where k.indexrelid = autoembed.key_index(relation)));
end;

create function autoembed.drop_triggers(relation oid, row_trigger oid, target name) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    trigger name;
begin
    for trigger in
        select t.tgname from pg_trigger t where t.oid = row_trigger and t.tgrelid = relation
        union all
        select * from autoembed.statement_triggers(relation, target)
    loop
        execute format('drop trigger %I on %s', trigger, relation::regclass);
    end loop;
end
$$;

create function autoembed.drop_pending_index(relation oid, target smallint) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    index oid;
begin
    for index in select * from autoembed.pending_indexes(relation, target) loop
        execute format('drop index %s', index::regclass);
    end loop;
end
$$;

-- A row trigger without a registration: a table that was just restored brings its declaration along.
create function autoembed.adopt(trigger oid) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    arguments text[] := autoembed.arguments_of(trigger);
    relation oid := (select t.tgrelid from pg_trigger t where t.oid = trigger);
    target smallint := (select a.attnum from pg_attribute a
                        where a.attrelid = relation and a.attname = arguments[1] and not a.attisdropped);
    sources smallint[] := array(
        select a.attnum from unnest(arguments[6:]) with ordinality as u (name, n)
        join pg_attribute a on a.attrelid = relation and a.attname = u.name and not a.attisdropped order by n);
    adopted autoembed.registration;
begin
    if target is null or cardinality(sources) = 0 or cardinality(sources) < cardinality(arguments) - 5
        or arguments[4] not in ('deferred', 'immediate') or arguments[5] not in ('true', 'false') then
        raise exception using errcode = 'invalid_parameter_value',
            message = format('a trigger on %s that calls autoembed.invalidate() has arguments that do not fit the table', relation::regclass),
            hint = 'Declare columns with embed_column, which makes the trigger.';
    end if;
    insert into autoembed.registration (relation, target, sources, model, fingerprint, mode, enabled, row_trigger)
    values (relation, target, sources, arguments[2], arguments[3], arguments[4], arguments[5]::boolean, trigger)
    on conflict do nothing
    returning * into adopted;
    if adopted.id is not null and not autoembed.is_sound(adopted) then
        raise exception using errcode = 'object_not_in_prerequisite_state',
            message = format('%s cannot have an embedding column with these source and target columns', relation::regclass),
            hint = 'Declare columns with embed_column, which says what is wrong.';
    end if;
end
$$;

-- security definer: registrations must follow their tables whoever renames or restores them. Runs no user's code:
-- it reads catalogs and makes triggers.
create function autoembed.on_ddl() returns event_trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
    touched oid[] := array(
        select distinct a.relid
        from pg_event_trigger_ddl_commands() d
        left join pg_trigger t on d.classid = 'pg_trigger'::regclass and t.oid = d.objid
        left join pg_type y on d.command_tag = 'ALTER TYPE' and (y.oid = d.objid or y.typrelid = d.objid)
        left join pg_class c on c.reloftype = y.oid  -- typed tables, which ALTER TYPE … CASCADE does not name
        cross join lateral (
            select coalesce(c.oid, t.tgrelid, d.objid) as relid
            union select p.relid from pg_partition_ancestors(coalesce(c.oid, t.tgrelid, d.objid)) p) a);
    trigger record;
    id bigint;
begin
    for trigger in
        select t.oid
        from pg_event_trigger_ddl_commands() d
        join pg_trigger t on d.classid = 'pg_trigger'::regclass and t.oid = d.objid
        where t.tgfoid = 'autoembed.invalidate()'::regprocedure and t.tgparentid = 0
          and not exists (select from autoembed.registration r
                          join pg_attribute a on a.attrelid = r.relation and a.attnum = r.target
                          where r.relation = t.tgrelid and a.attname::text = (autoembed.arguments_of(t.oid))[1])
    loop
        perform autoembed.adopt(trigger.oid);
    end loop;
    -- a column of the key may have another name now
    update autoembed.registration r set generation = r.generation + 1
    where r.relation = any (touched) and exists (
        select from pg_event_trigger_ddl_commands() d where d.classid = 'pg_class'::regclass);
    for id in
        with near as materialized (select r from autoembed.registration r where r.relation = any (touched))
        select (n.r).id from near n where autoembed.is_outdated(n.r)
    loop
        perform autoembed.follow(id);
    end loop;
    -- ENABLE TRIGGER ALL, as loaders do, would leave a subscriber's vectors stale
    for trigger in
        with near as materialized (
            select autoembed.row_trigger(r) as oid from autoembed.registration r where r.relation = any (touched))
        select t.tgname, t.tgrelid from near n join pg_trigger t on n.oid in (t.oid, t.tgparentid) where t.tgenabled = 'O'
    loop
        execute format('alter table %s enable always trigger %I', trigger.tgrelid::regclass, trigger.tgname);
    end loop;
end
$$;

-- Does the row trigger say or do another thing than the registration?
create function autoembed.is_outdated(r autoembed.registration) returns boolean
language sql stable
begin atomic
    select autoembed.is_sound(r)
           and (autoembed.arguments_of(t.oid) is distinct from autoembed.trigger_arguments((r).id)
                or t.tgattr::text <> '' and autoembed.needs_every_update((r).relation)
                or not autoembed.fires_last(r))
    from pg_catalog.pg_trigger t where t.oid = autoembed.row_trigger(r);
end;

-- After a RENAME of a column, or a new trigger of the user's own: our triggers anew, from the registration
create function autoembed.follow(registration bigint) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    r autoembed.registration;
    former text;
    trigger name;
begin
    select * into r from autoembed.registration g where g.id = registration;
    former := (autoembed.arguments_of(autoembed.row_trigger(r)))[1];
    update autoembed.registration g set generation = g.generation + 1 where g.id = r.id;
    perform autoembed.install_row_trigger(registration);
    for trigger in select * from autoembed.statement_triggers(r.relation, former::name) loop
        execute format('drop trigger %I on %s', trigger, r.relation::regclass);
    end loop;
    perform autoembed.install_statement_triggers(registration);
end
$$;

-- A table, a column or the trigger went: the registration goes too, and what is left of it on the table.
create function autoembed.on_drop() returns event_trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
    r record;
    trigger name;
begin
    for r in
        with touched as materialized (
            select case d.object_type when 'trigger' then to_regclass(format('%I.%I', d.address_names[1], d.address_names[2]))::oid
                       else d.objid end as oid
            from pg_event_trigger_dropped_objects() d where d.object_type in ('table', 'table column', 'trigger')
        ), near as materialized (
            select g.id from autoembed.registration g join touched t on t.oid = g.relation
        )
        delete from autoembed.registration g
        using near
        where g.id = near.id
          and (not exists (select from pg_class c where c.oid = g.relation)
               or autoembed.column_name(g.relation, g.target) is null
               or cardinality(autoembed.column_names(g.relation, g.sources)) is distinct from cardinality(g.sources)
               or g.row_trigger is not null and autoembed.row_trigger(g) is null)
        returning g.*, (autoembed.arguments_of(g.row_trigger))[1] as target_name
    loop
        continue when not exists (select from pg_class c where c.oid = r.relation);
        perform autoembed.drop_triggers(r.relation, r.row_trigger, coalesce(r.target_name, autoembed.column_name(r.relation, r.target)::text)::name);
        perform autoembed.drop_pending_index(r.relation, r.target);
    end loop;
end
$$;

create event trigger autoembed_on_ddl on ddl_command_end
    when tag in ('CREATE TRIGGER', 'ALTER TRIGGER', 'ALTER TABLE', 'ALTER TYPE') execute function autoembed.on_ddl();
alter event trigger autoembed_on_ddl enable always;
create event trigger autoembed_on_drop on sql_drop execute function autoembed.on_drop();
alter event trigger autoembed_on_drop enable always;
