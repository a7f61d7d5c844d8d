-- The row trigger on a user's table: it takes a vector away when the text changes, and its arguments are the
-- registration.

-- Keeps a row from carrying another text's vector. Where the text has changed, the vector goes in the same write. Where
-- an UPDATE brings a vector of its own, the row keeps what the fill made of its text: an object mapper that saves whole
-- rows would otherwise write a remembered vector back beside a new text. A column whose `writes` is 'anyone', and a
-- replication's apply worker, may bring a vector: it is taken where it differs from the old one.
-- The when-condition has found that the text or the vector differs, and that it is not the fill that writes.
-- Its arguments are target, model, fingerprint, mode, enabled, options, source, ...: the whole registration
-- (see 10_state.sql).
create function autoembed.invalidate() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
    is_free boolean := tg_argv[5]::jsonb ->> 'writes' = 'anyone'
        or current_setting('session_replication_role') = 'replica';
    fills boolean := coalesce(current_setting('autoembed.fill', true), '') = 'on';
    text_changed boolean;
    brings_vector boolean;
    former text;
begin
    -- The statement fails where a column is missing, which is better than a stale vector.
    execute format(
        'select %s, ($2).%2$I is not null and not record_image_eq(row(($1).%2$I), row(($2).%2$I)), (($1).%2$I)::text',
        (select string_agg(format(
            '(($1).%1$I)::text collate "C" is distinct from (($2).%1$I)::text collate "C"', s.name), ' or ')
         from unnest(tg_argv[6:]) as s (name)), tg_argv[0])
    into text_changed, brings_vector, former using old, new;
    if brings_vector and fills then
        null;  -- a trigger of the user's changes the text in the fill's own write
    elsif brings_vector and is_free is not true then
        perform autoembed.say_not_taken(tg_relid, tg_argv[0]);
    elsif brings_vector then
        return new;
    end if;
    if text_changed then
        return jsonb_populate_record(new, jsonb_build_object(tg_argv[0], null));
    elsif brings_vector then
        return jsonb_populate_record(new, jsonb_build_object(tg_argv[0], former));
    end if;
    return new;
end
$$;

-- Once a session: an object mapper that saves whole rows would otherwise be told with every statement.
create function autoembed.say_not_taken(relation oid, target text) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
    if current_setting('autoembed.said_not_taken', true) = 'yes' then
        return;
    end if;
    perform set_config('autoembed.said_not_taken', 'yes', false);
    raise notice using
        message = format('an UPDATE of %s does not set column %I: its vectors come from the fill alone',
                         relation::regclass, target),
        hint = format('To let an UPDATE bring vectors: select embed_column_set(%L, %L, writes => %L)',
                      relation::regclass, target, 'anyone');
end
$$;

create function autoembed.trigger_arguments(registration bigint) returns text[]
language sql stable
begin atomic
    select array[a.attname::text, r.model, r.fingerprint, r.mode, r.enabled::text, r.options::text]
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
        where t.tgrelid in (select m from autoembed.family(relation) m)
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
    order by t.oid = (r).row_trigger desc nulls last, t.tgparentid <> 0,
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
    where t.tgrelid in (select m from autoembed.family(relation) m)
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

-- When the row trigger has something to do: the text differs; or a vector is brought, and neither by the fill, which
-- says so by a setting that holds for its one statement, nor by replication. Where no trigger of the user's can change
-- the text in the fill's write, that write compares no texts.
create function autoembed.row_trigger_condition(r autoembed.registration) returns text
language sql stable
begin atomic
    select case when (r).options ->> 'writes' is not null then w.text_differs
        else format(
            case when autoembed.needs_every_update((r).relation) then '%1$s or %2$s and %3$s'
                 else '%2$s and (%1$s or %3$s)' end,
            w.text_differs, 'coalesce(pg_catalog.current_setting(''autoembed.fill'', true), '''') <> ''on''',
            format('new.%1$I is not null and pg_catalog.current_setting(''session_replication_role'') <> ''replica''
                    and (old.%1$I is null or not old.%1$I operator(%2$s.=) new.%1$I)',
                   a.attname, t.typnamespace::pg_catalog.regnamespace)) end
    from (select string_agg(
              format('(old.%1$I)::text collate "C" is distinct from (new.%1$I)::text collate "C"', u.name), ' or ')
          from unnest(autoembed.column_names((r).relation, (r).sources)) as u (name)) as w (text_differs)
    cross join pg_catalog.pg_attribute a join pg_catalog.pg_type t on t.oid = a.atttypid
    where a.attrelid = (r).relation and a.attnum = (r).target;
end;

create function autoembed.install_row_trigger(registration bigint) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    r autoembed.registration;
    watched name[];
    trigger name;
begin
    select * into r from autoembed.registration g where g.id = install_row_trigger.registration;
    trigger := autoembed.name_row_trigger(r);
    watched := autoembed.column_names(r.relation, r.sources);
    if r.options ->> 'writes' is null then
        watched := watched || autoembed.target_name(r.id);
    end if;
    execute format(
        'create or replace trigger %I before update %s on %s for each row when (%s)
         execute function autoembed.invalidate(%s)',
        trigger,
        case when not autoembed.needs_every_update(r.relation)
            then 'of ' || (select string_agg(quote_ident(u), ', ') from unnest(watched) u) end,
        r.relation::regclass, autoembed.row_trigger_condition(r),
        (select string_agg(quote_literal(u), ', ' order by n)
         from unnest(autoembed.trigger_arguments(registration)) with ordinality as a (u, n)));
    -- also where session_replication_role is replica: a subscriber's vectors go stale like anybody's
    execute format('alter table %s enable always trigger %I', r.relation::regclass, trigger);
    execute format('alter trigger %I on %s depends on extension pg_autoembed', trigger, r.relation::regclass);
    perform autoembed.request(r.id, 'note trigger', (
        select jsonb_build_object('oid', t.oid) from pg_trigger t where t.tgrelid = r.relation and t.tgname = trigger));
end
$$;

-- '~' sorts behind all ascii letters; where a user's trigger sorts behind that, ours takes its name and adds one more.
-- Renames the trigger that is there already. A partitioned table's has a name of its own: PostgreSQL copies it to the
-- partitions, and a table that is attached may be declared, too.
create function autoembed.name_row_trigger(r autoembed.registration) returns name
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    former name := (select t.tgname from pg_trigger t where t.oid = autoembed.row_trigger(r));
    last text := autoembed.last_trigger(r.relation);
    is_partitioned boolean := (select c.relkind = 'p' from pg_class c where c.oid = r.relation);
    wanted name := coalesce(former, autoembed.free_trigger_name(
        r.relation, format('~autoembed_%s%s', autoembed.cut(autoembed.column_name(r.relation, r.target), 40),
                           case when is_partitioned then '_' || r.relation end)));
begin
    if wanted::text collate "C" <= last collate "C" then
        if octet_length(last) > 58 then
            perform autoembed.refuse(r.relation, format('no trigger can fire after %I', last),
                'Give that trigger a shorter name.');
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
begin
    perform autoembed.drop_trigger(relation, t.tgname) from pg_trigger t
    where t.oid = row_trigger and t.tgrelid = relation;
    perform autoembed.drop_statement_triggers(relation, target);
end
$$;

-- With one of them others may have gone: see on_drop.
create function autoembed.drop_trigger(relation oid, trigger name) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
    if exists (select from pg_trigger t where t.tgrelid = relation and t.tgname = trigger) then
        execute format('drop trigger %I on %s', trigger, relation::regclass);
    end if;
end
$$;
