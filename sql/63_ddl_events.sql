-- The event triggers that keep registrations and the triggers on users' tables together.

-- Are these the options of a column, as a row trigger carries them? It may be written by hand.
create function autoembed.are_options(argument text, sources integer) returns boolean
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
    options jsonb := argument::jsonb;
begin
    return jsonb_typeof(options) = 'object'
        and options - array['template', 'writes'] = '{}'
        and coalesce(options ->> 'writes', 'anyone') = 'anyone'
        and (not options ? 'template' or autoembed.is_bound_template(options ->> 'template', sources));
exception when data_exception then
    return false;
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
        select a.attnum from unnest(arguments[7:]) with ordinality as u (name, n)
        join pg_attribute a on a.attrelid = relation and a.attname = u.name and not a.attisdropped order by n);
begin
    if target is null or cardinality(sources) = 0 or cardinality(sources) < cardinality(arguments) - 6
        or arguments[4] not in ('deferred', 'immediate') or arguments[5] not in ('true', 'false')
        or not autoembed.are_options(arguments[6], cardinality(sources)) then
        raise exception using errcode = 'invalid_parameter_value',
            message = format('a trigger on %s that calls autoembed.invalidate() has arguments that do not fit the table', relation::regclass),
            hint = 'Declare columns with embed_column, which makes the trigger.';
    end if;
    perform autoembed.register(jsonb_build_object(
        'relation', relation, 'target', target, 'sources', sources, 'model', arguments[2], 'fingerprint', arguments[3],
        'mode', arguments[4], 'enabled', arguments[5]::boolean, 'options', arguments[6]::jsonb, 'row_trigger',
            trigger));
end
$$;

-- Security definer: registrations must follow their tables whoever renames or restores them. It runs no user's code: it
-- reads catalogs and makes triggers. Every ALTER TABLE of the database comes by, so it looks first whether a relation
-- is declared; and jit is off because the caller's planner settings hold here as well, and what is switched off counts
-- as expensive.
create function autoembed.on_ddl() returns event_trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp set jit = off as $$
declare
    altered oid[];   -- what a command changes itself
    touched oid[];   -- that, what is given a trigger, and the partitioned tables above
    triggers oid[];  -- row triggers of ours
    trigger record;
    id bigint;
begin
    select array_agg(d.objid) filter (where d.classid = 'pg_class'::regclass),
           array_agg(coalesce(t.tgrelid, d.objid)),
           array_agg(t.oid) filter (where t.tgfoid = 'autoembed.invalidate()'::regprocedure and t.tgparentid = 0)
    into altered, touched, triggers
    from pg_event_trigger_ddl_commands() d
    left join lateral (  -- one by one: the planner expects a hundred commands, and would read all of pg_trigger
        select g.oid, g.tgrelid, g.tgfoid, g.tgparentid from pg_trigger g
        where d.classid = 'pg_trigger'::regclass and g.oid = d.objid offset 0) t on true;
    if tg_tag = 'ALTER TYPE' then  -- CASCADE alters typed tables, and names none
        altered := array(select c.oid from unnest(touched) u
                         join pg_type y on u in (y.oid, y.typrelid) join pg_class c on c.reloftype = y.oid);
        touched := altered;
    end if;
    touched := array(select u from unnest(touched) u union all select p.relid from unnest(touched) u,
        pg_partition_ancestors(u) p);
    if triggers is null and not exists (select from autoembed.registration r where r.relation = any (touched)) then
        return;
    end if;
    for trigger in
        select t.oid from pg_trigger t
        where t.oid = any (triggers)
          and not exists (select from autoembed.registration r
                          join pg_attribute a on a.attrelid = r.relation and a.attnum = r.target
                          where r.relation = t.tgrelid and a.attname::text = (autoembed.arguments_of(t.oid))[1])
    loop
        perform autoembed.adopt(trigger.oid);
    end loop;
    -- A column of the key may have another name now. Of a partition's ALTER TABLE nothing reaches the registration:
    -- with a row written there, two partitions could not be altered at once.
    update autoembed.registration r set generation = r.generation + 1 where r.relation = any (altered);
    for id in
        with near as materialized (select r from autoembed.registration r where r.relation = any (touched))
        select (n.r).id from near n where autoembed.is_outdated(n.r)
    loop
        perform autoembed.follow(id);
    end loop;
    perform autoembed.follow_partitions(r) from autoembed.registration r
    join pg_class c on c.oid = r.relation and c.relkind = 'p' where r.relation = any (touched);
    -- ENABLE TRIGGER ALL, as loaders do, would leave a subscriber's vectors stale
    for trigger in
        with near as materialized (
            select autoembed.row_trigger(r) as oid from autoembed.registration r where r.relation = any (touched))
        select t.tgname, t.tgrelid from near n join pg_trigger t on n.oid in (t.oid, t.tgparentid)
            where t.tgenabled = 'O'
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
begin
    select * into r from autoembed.registration g where g.id = registration;
    former := (autoembed.arguments_of(autoembed.row_trigger(r)))[1];
    update autoembed.registration g set generation = g.generation + 1 where g.id = r.id;
    perform autoembed.install_row_trigger(registration);
    perform autoembed.drop_statement_triggers(r.relation, former::name);
    perform autoembed.install_statement_triggers(registration);
end
$$;

-- A table, a column or the trigger went: the registration goes too, and what is left of it on the table.
create function autoembed.on_drop() returns event_trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp set jit = off as $$
declare
    touched oid[] := array(
        select case d.object_type when 'trigger' then to_regclass(format('%I.%I', d.address_names[1],
            d.address_names[2]))::oid
               else d.objid end
        from pg_event_trigger_dropped_objects() d where d.object_type in ('table', 'table column', 'trigger'));
    r record;
    trigger name;
begin
    if not exists (select from autoembed.registration g where g.relation = any (touched)
                   union all select from autoembed.partition p where p.relation = any (touched)) then
        return;
    end if;
    for r in
        delete from autoembed.registration g
        where g.relation = any (touched)
          and (not exists (select from pg_class c where c.oid = g.relation)
               or autoembed.column_name(g.relation, g.target) is null
               or cardinality(autoembed.column_names(g.relation, g.sources)) is distinct from cardinality(g.sources)
               or g.row_trigger is not null and autoembed.row_trigger(g) is null)
        returning g.*, (autoembed.arguments_of(g.row_trigger))[1] as target_name
    loop
        continue when not exists (select from pg_class c where c.oid = r.relation);
        perform autoembed.drop_triggers(r.relation, r.row_trigger,
            coalesce(r.target_name, autoembed.column_name(r.relation, r.target)::text)::name);
        perform autoembed.drop_pending_index(r.relation, r.target);
    end loop;
    delete from autoembed.partition p
    where p.relation = any (touched) and not exists (select from pg_class c where c.oid = p.relation);
end
$$;

create event trigger autoembed_on_ddl on ddl_command_end
    when tag in ('CREATE TABLE', 'CREATE TRIGGER', 'ALTER TRIGGER', 'ALTER TABLE', 'ALTER TYPE')
    execute function autoembed.on_ddl();
alter event trigger autoembed_on_ddl enable always;
create event trigger autoembed_on_drop on sql_drop execute function autoembed.on_drop();
alter event trigger autoembed_on_drop enable always;
