-- The row trigger on a user's table: it takes a vector away when the text changes, and its arguments are the
-- registration.

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
