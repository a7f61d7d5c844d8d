-- Filling by pg_cron: one job per owner, run as that owner. pg_cron is optional, so nothing here is bound when created.

-- A tick. With nothing pending it is plain SQL: it starts no Python, and so imports nothing.
create procedure autoembed.tick(batch integer)
language plpgsql as $$
declare
    embedded pg_catalog.int8 := 0;
    failed pg_catalog.int8 := 0;
    skipped pg_catalog.int8 := 0;
    cached pg_catalog.int8 := 0;
begin
    if autoembed.any_pending() then
        call @extschema@.embed_pending(
            batch => batch, relation => null::pg_catalog.regclass, max_rows => null::pg_catalog.int8,
            max_seconds => null::pg_catalog.int4, embedded => embedded, failed => failed, skipped => skipped,
            cached => cached);
    end if;
end
$$;

create function autoembed.any_pending() returns boolean
language plpgsql volatile as $$
declare
    r autoembed.registration;
begin
    for r in select g.* from autoembed.registration g where g.enabled and autoembed.is_own(g.relation) loop
        if autoembed.probe(r) and autoembed.any_due(autoembed.column_sql_of(r.id)) then
            return true;
        end if;
    end loop;
    return false;
end
$$;

-- Is a row in the partial index? Without a column_sql: to make one takes longer than all the rest of a tick.
create function autoembed.probe(r autoembed.registration, mode text default 'row exclusive mode') returns boolean
language plpgsql volatile set enable_seqscan = off set enable_sort = off set enable_bitmapscan = off set jit = off as $$
declare
    rows pg_catalog.text := autoembed.rows_of(r.relation);
    target pg_catalog.name := autoembed.column_name(r.relation, r.target);
    found pg_catalog.bool;
begin
    if rows is null or target is null or not autoembed.lock_relation(rows, mode)
        or not autoembed.is_own(r.relation) or rows operator(pg_catalog.<>) autoembed.rows_of(r.relation)
            or not autoembed.is_sound(r) then
        return false;
    end if;
    execute pg_catalog.format('select exists (select from %s t where %s order by t.%I is null limit 1)', rows,
                              autoembed.pending_condition('t.', target, autoembed.column_names(r.relation, r.sources)),
                                  target) into found;
    return found;
end
$$;

-- null where the library is not loaded, '' where the caller may not know
create function autoembed.cron_setting(name text) returns text
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
    return current_setting('cron.' || name, true);
exception when insufficient_privilege then
    return '';
end
$$;

create function autoembed.has_cron() returns boolean
language sql stable
begin atomic
    select exists (select from pg_catalog.pg_extension e where e.extname = 'pg_cron');
end;

-- Where pg_cron keeps its jobs in another database: over a connection of the caller's own, by dblink, which both may
-- or may not be allowed.
create function autoembed.ask_cron(query text) returns setof text
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    dblink text := (select format('%I.dblink', n.nspname) from pg_extension e
        join pg_namespace n on n.oid = e.extnamespace where e.extname = 'dblink');
    cron_database text := autoembed.cron_setting('database_name');
begin
    if autoembed.has_cron() then
        begin
            return query execute query;
        exception when invalid_parameter_value then
            raise exception using errcode = 'invalid_parameter_value', message = sqlerrm,
                hint = autoembed.schedule_forms();
        end;
    elsif cron_database is null then
        raise exception using errcode = 'feature_not_supported', message = 'pg_cron is not loaded in this server',
            hint = format('Install it (Debian: postgresql-%s-cron), add pg_cron to shared_preload_libraries, set cron.database_name and restart; '
                          'or keep CALL embed_worker() running some other way.',
                              current_setting('server_version_num')::integer / 10000);
    elsif cron_database = current_database() then
        raise exception using errcode = 'undefined_object', message = 'the extension pg_cron is not in this database',
            hint = 'A superuser runs CREATE EXTENSION pg_cron here; then GRANT USAGE ON SCHEMA cron to those who schedule.';
    else
        begin
            return query execute format('select * from %s($1, $2) as (answer text)', dblink)
                using format('host=%s port=%s dbname=%s user=%s',
                    autoembed.connection_value(split_part(autoembed.socket_directory(), ',', 1)),
                             current_setting('port'), autoembed.connection_value(cron_database),
                                 autoembed.connection_value(current_user)), query;
        exception when others then
            if sqlerrm ~ '^(canceling|terminating)' then raise; end if;
            raise exception using errcode = 'object_not_in_prerequisite_state',
                message = format('pg_cron keeps its jobs in database %s, which cannot be reached from here%s',
                                 coalesce(nullif(cron_database, ''), 'cron.database_name'),
                                     ' as ' || current_user || ' by ' || dblink),
                detail = format('The statement for that database is: %s', query),
                hint = case when dblink is null
                    then 'CREATE EXTENSION dblink here, or run the statement there as a superuser.'
                            else 'Run the statement there as a superuser.' end;
        end;
    end if;
end
$$;

-- libpq's quotes are not SQL's
create function autoembed.connection_value(value text) returns text
language sql immutable
begin atomic
    select '''' || replace(replace(value, '\', '\\'), '''', '\''') || '''';
end;

create function autoembed.socket_directory() returns text
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
    return trim(current_setting('unix_socket_directories'));
exception when insufficient_privilege then
    return '';
end
$$;

create function autoembed.schedule_forms() returns text
language sql immutable
begin atomic
    select 'As ''10 seconds'' (1 to 59), as cron writes it (''*/5 * * * *''), or ''worker'' for a worker that stays on.';
end;

-- As far as is plain before pg_cron is asked, which may be in another database: seconds, a name, or cron's five fields.
create function autoembed.is_schedule(schedule text) returns boolean
language sql immutable
begin atomic
    select schedule = 'worker' or schedule ~ '^([1-9]|[1-5][0-9]) seconds?$'
        or schedule ~ '^@(reboot|yearly|annually|monthly|weekly|daily|midnight|hourly)$'
        or schedule ~* '^([0-9*,/$-]+[ \t]+){3}([0-9*,/$-]|jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)+[ \t]+([0-9*,/$-]|sun|mon|tue|wed|thu|fri|sat)+$';
end;

-- '10 seconds' as pg_cron 1.5 understands it; up to 1.4 a job each minute keeps a worker on, which is as quick
create function autoembed.knows_seconds() returns boolean
language sql stable
begin atomic
    select coalesce((select (string_to_array(split_part(e.extversion, '-', 1), '.'))[1:2]::integer[] >= array[1, 5]
                     from pg_catalog.pg_extension e where e.extname = 'pg_cron'), false);
end;

-- is the job a worker that stays on, or a tick?
create function autoembed.stays_on(schedule text) returns boolean
language sql stable
begin atomic
    select schedule = 'worker' or schedule ~ '^[0-9]+ seconds?$' and not autoembed.knows_seconds();
end;

create function autoembed.job_schedule(schedule text) returns text
language sql stable
begin atomic
    select case when autoembed.stays_on(schedule) then '* * * * *' else schedule end;
end;

create function autoembed.job_name(number integer) returns text
language sql stable
begin atomic
    select format('pg_autoembed %s %s', current_database(), number);
end;

-- Everything qualified, all arguments named and of their very types: any role may put an embed_pending(int) of its
-- own on a path, and where the schema lets it an embed_worker whose totals are integers, which fit a plain 0 better.
create function autoembed.job_call(schedule text, batch integer, workers integer) returns text
language sql stable
begin atomic
    select case when autoembed.stays_on(schedule)
        then format('call @extschema@.embed_worker(batch => %s, max_seconds => 55, workers => %s, '
                    'embedded => n, failed => n, skipped => n, cached => n)', coalesce(batch::text, 'null'), workers)
        else format('call autoembed.tick(batch => %s)', coalesce(batch::text, 'null')) end;
end;

-- DROP EXTENSION knows nothing of jobs, and no event trigger of an extension sees it go: so a job looks whether there
-- is still something to call, and removes itself where there is not.
create function autoembed.job_command(schedule text, batch integer, workers integer, number integer) returns text
language sql stable
begin atomic
    select format('do %L', format(
        'declare n pg_catalog.int8 := 0; begin if exists (select from pg_catalog.pg_extension where extname operator(pg_catalog.=) %L) then %s; else %s; end if; end',
        'pg_autoembed', autoembed.job_call(schedule, batch, workers),
        case when autoembed.has_cron() then format('perform cron.unschedule(%L)', autoembed.job_name(number))
             else format('raise exception using message = %L, hint = %L',
                 'pg_autoembed is not in this database any more',
                         format('Where pg_cron keeps its jobs: select cron.unschedule(jobid) from cron.job where jobname = %L', autoembed.job_name(number))) end));
end;

create function autoembed.check_schedule(schedule text, batch integer, workers integer) returns void
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
    if batch not between 1 and 512 then
        raise exception using errcode = 'invalid_parameter_value', message = format('batch is %s', batch),
            hint = 'batch is 1 to 512, or null for EMBEDDING_BATCH_SIZE.';
    elsif workers is null or workers not between 1 and 64 then
        raise exception using errcode = 'invalid_parameter_value',
            message = format('workers is %s', coalesce(workers::text, 'null')), hint = 'workers is 1 to 64.';
    elsif autoembed.is_schedule(schedule) is not true then
        raise exception using errcode = 'invalid_parameter_value',
            message = format('invalid schedule: %s', coalesce(schedule, 'null')),
            hint = autoembed.schedule_forms();
    elsif autoembed.has_cron() and not has_schema_privilege('cron', 'usage') then
        raise exception using errcode = 'insufficient_privilege',
            message = 'permission denied to schedule jobs with pg_cron',
            hint = format('A superuser runs: GRANT USAGE ON SCHEMA cron TO %I', current_user);
    elsif autoembed.cron_setting('use_background_workers') = 'off' then
        raise warning
            using message = 'pg_cron will connect to localhost for each job, and pg_hba.conf must let it in without a password',
            hint = 'Set cron.use_background_workers = on and restart: then it needs no connection.';
    end if;
end
$$;

-- A superuser schedules for every owner of a declared column, any other role for itself: filling runs as the owner.
create function autoembed.scheduled_roles() returns setof name
language sql stable
begin atomic
    select current_user where not exists (select from autoembed.registration r
        join pg_catalog.pg_class c on c.oid = r.relation)
        or not (select u.rolsuper from pg_catalog.pg_roles u where u.rolname = current_user)
    union
    select o.rolname from autoembed.registration r
    join pg_catalog.pg_class c on c.oid = r.relation
    join pg_catalog.pg_roles o on o.oid = c.relowner
    where (select u.rolsuper from pg_catalog.pg_roles u where u.rolname = current_user);
end;

-- The statements that let a role's jobs run; null: they may.
create function autoembed.missing_grants(role name, schedule text) returns text
language sql stable
begin atomic
    select string_agg(g.statement, '; ')
    from pg_catalog.pg_proc p
    cross join lateral (
        select format('GRANT USAGE ON SCHEMA %s TO %I', p.pronamespace::regnamespace, role) as statement
        where not has_schema_privilege(role, p.pronamespace, 'usage')
        union all
        select format('GRANT EXECUTE ON PROCEDURE %s TO %I', p.oid::regprocedure, role)
        where not has_function_privilege(role, p.oid, 'execute')) g
    where p.oid = case when autoembed.stays_on(schedule)
        then '@extschema@.embed_worker(integer, integer, integer, bigint, bigint, bigint, bigint)'::regprocedure
        else '@extschema@.embed_pending(integer, regclass, bigint, integer, bigint, bigint, bigint, bigint)'::regprocedure end;
end;

create function autoembed.warn_of_missing_grants(role name, schedule text) returns void
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
    grants text := autoembed.missing_grants(role, schedule);
begin
    if grants is not null then
        raise warning using errcode = '01007',
            message = format('the jobs of role %I will fail: it may not execute what they call', role), hint = grants;
    end if;
end
$$;

create function embed_schedule(
    schedule text default '10 seconds', batch integer default null, workers integer default 1,
    out role name, out job bigint, out job_schedule text, out command text)
returns setof record
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
    schedule := trim(schedule);
    perform autoembed.check_schedule(schedule, batch, workers);
    job_schedule := autoembed.job_schedule(schedule);
    for role in select * from autoembed.scheduled_roles() loop
        if not (select u.rolcanlogin from pg_roles u where u.rolname = role) then
            raise warning using message = format('no job for role %I: it may not log in, and its jobs would fail',
                role), hint = format('ALTER ROLE %I LOGIN', role);
            continue;
        end if;
        perform autoembed.warn_of_missing_grants(role, schedule);
        for n in 1 .. workers loop
            command := autoembed.job_command(schedule, batch, workers, n);
            job := autoembed.ask_cron(autoembed.schedule_query(n, job_schedule, command, role));
            return next;
        end loop;
        perform autoembed.ask_cron(autoembed.unschedule_query(role, workers));
    end loop;
end
$$;

comment on function embed_schedule(text, integer, integer) is
    'Has pg_cron fill from now on, as the caller, or as each owner where a superuser calls. Other arguments change '
    'the jobs.';

create function autoembed.schedule_query(number integer, schedule text, command text, role name) returns text
language sql stable
begin atomic
    select case when role = current_user and autoembed.has_cron()
        then format('select cron.schedule(%L, %L, %L)::text', autoembed.job_name(number), schedule, command)
        else format('select cron.schedule_in_database(%L, %L, %L, %L, %L)::text', autoembed.job_name(number), schedule,
            command, current_database(), role) end;
end;

-- condition over cron.job j: a job of this database beyond that number
create function autoembed.own_jobs(beyond integer) returns text
language sql stable
begin atomic
    select format('j.database = %1$L and starts_with(j.jobname, %2$L) and substring(j.jobname from '' ([0-9]{1,9})$'')::integer > %3$s',
                  current_database(), format('pg_autoembed %s ', current_database()), beyond);
end;

-- of all roles where `role` is null
create function autoembed.unschedule_query(role name, beyond integer) returns text
language sql stable
begin atomic
    select format('select cron.unschedule(j.jobid)::text from cron.job j where %s%s', autoembed.own_jobs(beyond),
                  case when role is not null then format(' and j.username = %L', role) end);
end;

create function embed_unschedule() returns bigint
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
    perform autoembed.check_schedule('worker', 1, 1);
    return (select count(*) from autoembed.ask_cron(autoembed.unschedule_query(
        case when not (select u.rolsuper from pg_roles u where u.rolname = current_user) then current_user end, 0)));
end
$$;

comment on function embed_unschedule() is
    'Removes the jobs of embed_schedule, the caller''s own, or all where a superuser calls, and returns how many '
    'there were.';
