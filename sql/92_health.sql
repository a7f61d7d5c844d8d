-- Is all well? One row a check. Monitors read it every few seconds, as anybody: each check is cheap, speaks of what the
-- reader may know, quotes no row, and takes no other with it when it cannot be made.
-- 'fail' is left to what keeps the whole server from embedding. Nothing that an ordinary role can bring about is one,
-- or any tenant could have a container restarted.

create function autoembed.extension_health(out check_name text, out status text, out message text, out hint text)
language sql stable
begin atomic
    select 'extension',
           case when e.extversion = a.default_version then 'ok' else 'warn' end,
           case when e.extversion = a.default_version then format('pg_autoembed %s', e.extversion)
                when a.default_version is null then format('this database has pg_autoembed %s, the server has none',
                    e.extversion)
                else format('this database has pg_autoembed %s, the server %s', e.extversion, a.default_version) end,
           case when a.default_version is null then 'Install the extension''s files again (make install).'
                when e.extversion <> a.default_version then 'ALTER EXTENSION pg_autoembed UPDATE' end
    from pg_catalog.pg_extension e
    left join pg_catalog.pg_available_extensions a on a.name = e.extname
    where e.extname = 'pg_autoembed';
end;

-- model, encoder, torch and preload
create function autoembed.list_checks(
    out check_name text, out status text, out message text, out hint text, out refusal autoembed.refusal)
returns setof record
language plpython3u volatile parallel unsafe as $$
if "autoembed 1" not in GD: plpy.execute("select autoembed.start()")
return GD["autoembed 1"].list_checks()
$$;

create function autoembed.encoding_health(out check_name text, out status text, out message text, out hint text)
returns setof record
language sql volatile parallel unsafe
begin atomic
    select c.check_name, c.status, c.message, c.hint from autoembed.list_checks() c where autoembed.accepted(c.refusal);
end;

create function autoembed.columns_health(out check_name text, out status text, out message text, out hint text)
language sql stable
begin atomic
    with looked as materialized (select format('%s.%I', c.relation, c.target) as label, c.status
        from @extschema@.embedding_columns c),
    bad as (select min(format('%s: %s', l.label, l.status)) as first, count(*) as count
            from looked l where l.status not in ('ready', 'paused'))
    select 'columns', case when b.count > 0 then 'warn' else 'ok' end,
           case when b.count > 0 then format('%s of %s columns not ready: %s', b.count, n.count, b.first)
                when n.count = 0 then 'no column is declared'
                else format('%s declared%s', n.count, ', of which paused: ' || nullif(n.paused, 0)) end,
           case when b.count > 0 then 'embedding_columns has them all.' end
    from bad b, (select count(*) as count, count(*) filter (where l.status = 'paused') as paused from looked l) n;
end;

-- Whose columns the reader may ask about: its own, and those of roles that it is a member of.
create function autoembed.known_owners(out oid oid, out name name)
returns setof record
language sql stable
begin atomic
    select distinct o.oid, o.rolname
    from autoembed.registration r
    join pg_catalog.pg_class c on c.oid = r.relation
    join pg_catalog.pg_roles o on o.oid = c.relowner
    where r.enabled and pg_has_role(o.oid, 'usage');
end;

-- Has the column a row to be filled? Of the reader's own tables the index knows; for others' see counts.
create function autoembed.is_waiting(r autoembed.registration) returns boolean
language plpgsql volatile as $$
begin
    if not autoembed.is_own(r.relation) then
        return (select k.pending from autoembed.known_counts(r) k) operator(pg_catalog.>) 0;
    end if;
    return autoembed.probe(r, 'access share mode') and autoembed.any_due(autoembed.column_sql_of(r.id));
end
$$;

-- How long after one run of a schedule the next one begins; a day where that takes more than a look.
create function autoembed.interval_of(schedule text) returns interval
language sql immutable
begin atomic
    select case when schedule ~ '^[0-9]+ seconds?$' then split_part(schedule, ' ', 1)::integer * '1 second'::interval
                when schedule = '* * * * *' then '1 minute'::interval
                when schedule ~ '^\*/[0-9]{1,2} \* \* \* \*$'
                    then substring(schedule from 3 for position(' ' in schedule) - 3)::integer * '1 minute'::interval
                else '1 day'::interval end;
end;

-- The jobs of embed_schedule that the reader sees, and what became of each one's last run.
create function autoembed.jobs(
    out role name, out job bigint, out every interval, out active boolean, out run_status text,
        out run_started timestamptz)
returns setof record
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
    if not autoembed.has_cron() or not has_schema_privilege('cron', 'usage') then
        return;
    end if;
    return query execute format(
        'with recent as materialized (select * from cron.job_run_details order by runid desc limit 1000)
         select j.username::name, j.jobid, autoembed.interval_of(j.schedule), j.active, d.status, d.start_time
         from cron.job j
         left join lateral (select r.status, r.start_time from recent r where r.jobid = j.jobid
             order by r.runid desc limit 1) d on true
         where %s', autoembed.own_jobs(0));
end
$$;

-- what is wrong with a job; null: nothing
create function autoembed.job_trouble(every interval, active boolean, run_status text, run_started timestamptz)
    returns text
language sql stable
begin atomic
    select case when not active then 'is switched off'
                when run_status = 'failed' then format('failed when it was last run, at %s',
                    run_started::timestamptz(0))
                when run_status <> 'running' and run_started < clock_timestamp() - 2 * every - '2 minutes'::interval
                    then format('was last started at %s', run_started::timestamptz(0)) end;
end;

-- Whose columns nobody fills: the job is in trouble, or there is none although rows wait. A worker makes up for both.
create function autoembed.idle_owners(out name name, out works boolean, out trouble text, out failed boolean)
returns setof record
language sql volatile
begin atomic
    with job as materialized (
        select j.role, j.job, autoembed.job_trouble(j.every, j.active, j.run_status, j.run_started) as trouble
            from autoembed.jobs() j
    ), owner as materialized (
        select o.oid, o.name, autoembed.is_working(o.oid)
            or exists (select from job j where j.role = o.name and j.trouble is null) as works,
               (select min(format('job %s of %I %s', j.job, o.name, j.trouble)) from job j
                   where j.role = o.name) as trouble
        from autoembed.known_owners() o
    )
    select o.name, o.works,
           case when not o.works then coalesce(o.trouble, (
               select format(case when autoembed.is_own(r.relation)
                   then '%s has rows to be filled, but %I has no worker and no job'
                                  else '%s has rows to be filled, by its statistics, but %I has no worker and no job' end, r.relation::regclass, o.name)
               from autoembed.registration r join pg_catalog.pg_class c on c.oid = r.relation
               where c.relowner = o.oid and r.enabled and autoembed.is_waiting(r) limit 1)) end,
           o.trouble is not null
    from owner o;
end;

create function autoembed.schedule_hint(failed boolean) returns text
language sql stable
begin atomic
    select case when failed then 'cron.job_run_details has what it said; embed_schedule() makes the job anew.'
                when autoembed.has_cron()
                    then 'embed_schedule() makes a job for each owner; or keep CALL embed_worker() running.'
                when autoembed.cron_setting('database_name') = current_database()
                    then 'CREATE EXTENSION pg_cron, then call embed_schedule(); or keep CALL embed_worker() running.'
                when autoembed.cron_setting('database_name') is not null
                    then 'pg_cron keeps its jobs in another database, where nobody looks from here: if there is one, embedding_throughput shows it at work.'
                else 'pg_cron is not in this server: install it and call embed_schedule(), or keep CALL embed_worker() running.' end;
end;

create function autoembed.schedule_health(out check_name text, out status text, out message text, out hint text)
language sql volatile
begin atomic
    select 'schedule', case when i.idle > 0 then 'warn' else 'ok' end,
           case when i.idle > 0 then i.first || case when i.idle > 1 then format('; so it is with %s more', i.idle - 1)
               else '' end
                when i.owners = 0 then 'no column of the reader''s is declared'
                when i.working = i.owners then 'a worker or a job fills for each owner'
                when i.working = 0 then 'no worker and no job is there, but no row is known to wait'
                else format('a worker or a job fills for %s of %s owners; no row is known to wait for the others',
                    i.working, i.owners) end,
           case when i.idle > 0 then autoembed.schedule_hint(i.failed) end
    from (select count(*) as owners, count(*) filter (where o.works) as working, count(o.trouble) as idle,
        min(o.trouble) as first,
                 bool_or(o.failed and o.trouble is not null) as failed
          from autoembed.idle_owners() o) i;
end;

-- Since when a row waits, or longer. With track_commit_timestamp that is known of each row; without it, of those that
-- were there at the last checkpoint. Rows that have failed, and texts that are blank after all, wait for nothing.
create function autoembed.waits_since(s autoembed.column_sql) returns timestamptz
language plpgsql volatile
    set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off set jit = off
    set timezone = 'UTC' set intervalstyle = 'postgres' set bytea_output = 'hex' set extra_float_digits = 1 as $$
declare
    c record;
    since pg_catalog.timestamptz;
begin
    perform autoembed.lock_relation(s.rows, 'access share mode');
    if not autoembed.is_own(s.relation) or not autoembed.is_current(s) then
        return null;
    end if;
    select * into c from autoembed.last_checkpoint();
    execute pg_catalog.format(
        'select pg_catalog.min(c.written) from (
             select %s as written, %s as key, %s as content from %s t where %s order by %s limit 200) c
         where c.written is not null and %s and not exists (
             select from autoembed.failure f
             where f.registration operator(pg_catalog.=) $1
                 and f.key_hash operator(pg_catalog.=) pg_catalog.jsonb_hash_extended(c.key, 0)
               and f.key operator(pg_catalog.=) c.key)',
        autoembed.written_at(), s.key, s.content, s.rows, s.pending, s.ordering, autoembed.has_text('c.content'))
    into since using s.registration, c.age, c.at;
    return since;
end
$$;

create function autoembed.written_at() returns text
language sql stable
begin atomic
    select format('case when pg_catalog.age(t.xmin) operator(pg_catalog.<) 1000000000 then %s end',
                  case current_setting('track_commit_timestamp') when 'on'
                      then 'pg_catalog.pg_xact_commit_timestamp(t.xmin)'
                  else 'case when pg_catalog.age(t.xmin) operator(pg_catalog.>) $2 then $3 end' end);
end;

-- when it was, and how many transactions have begun since
create function autoembed.last_checkpoint(out at timestamptz, out age integer)
language sql stable
begin atomic
    select c.checkpoint_time, age(split_part(c.next_xid, ':', 2)::xid) from pg_catalog.pg_control_checkpoint() c;
end;

-- Does a row of the reader's own wait, with nothing embedded in its column for all that time? While a large table is
-- filled, the oldest row may be old.
create function autoembed.pending_health(
    patience interval default '10 minutes', out check_name text, out status text, out message text, out hint text)
language sql volatile
begin atomic
    with job as materialized (select j.role, min(j.every) as every from autoembed.jobs() j group by j.role),
    looked as materialized (
        select format('%s.%I', r.relation::regclass, autoembed.column_name(r.relation, r.target)) as label,
               autoembed.waits_since(autoembed.column_sql_of(r.id)) as since,
               (select max(u.finished) from autoembed.run u where u.registration = r.id and u.embedded > 0) as embedded,
               clock_timestamp() - patience - 2 * coalesce((select j.every from job j where j.role = current_user),
                   '0') as bound
        from autoembed.registration r
        where r.enabled and autoembed.is_own(r.relation)
    ), overdue as materialized (
        select l.* from looked l
        where coalesce(l.embedded < l.bound, true)
          and (l.since < l.bound or l.since is not null and current_setting('track_commit_timestamp') <> 'on')
    )
    select 'pending', case when count(*) > 0 then 'warn' else 'ok' end,
           case when count(*) > 0 then format('%s: rows wait since %s or longer, and none was embedded meanwhile%s',
                                              min(o.label), min(o.since)::timestamptz(0), case when count(*) > 1
                                                  then format('; so it is with %s',
                                                      autoembed.counted(count(*) - 1, 'more column',
                                                          'more columns')) end)
                else (select format('no row waits for long in %s of the reader''s own',
                    autoembed.counted(count(*), 'column', 'columns')) from looked l) end,
           case when count(*) > 0
               then 'See the checks named columns and schedule; embedding_progress has the column''s figures.' end
    from overdue o;
end;

-- what the reader's own columns cannot have
create function autoembed.failures_health(out check_name text, out status text, out message text, out hint text)
language sql stable
begin atomic
    select 'failures', case when f.failed + f.waiting > 0 then 'warn' else 'ok' end,
           case when f.failed + f.waiting = 0 then 'no row has failed'
                else format('%s failed for good, %s will be tried again',
                    autoembed.counted(f.failed, 'row has', 'rows have'), f.waiting) end,
           case when f.failed + f.waiting > 0
               then 'embedding_failures says which and why; embed_retry() tries them again.' end
    from (select count(*) filter (where x.next_try is null) as failed, count(x.next_try) as waiting
          from (select f.next_try from autoembed.failure f limit 10000) x) f;
end;

create function autoembed.suspects_health(out check_name text, out status text, out message text, out hint text)
language sql stable
begin atomic
    select 'suspects', case when count(*) > 0 then 'warn' else 'ok' end,
           case when count(*) > 0 then format('%s being embedded when the server crashed',
               autoembed.counted(count(*), 'text was', 'texts were'))
                else 'no text is suspected of having crashed the server' end,
           case when count(*) > 0
               then 'The next fill tries each of them alone: which of them it was will be known then.' end
    from (select from autoembed.suspect f limit 10000) x;
end;

-- No search_path is pinned: rows of the reader's own tables are looked at, with whatever runs then. A table that
-- somebody locks is not waited for.
create function autoembed.health(out check_name text, out status text, out message text, out hint text)
returns setof record
language plpgsql volatile set lock_timeout = '100ms' as $$
declare
    part pg_catalog.text;
begin
    foreach part in array array['extension', 'encoding', 'columns', 'schedule', 'pending', 'failures', 'suspects'] loop
        begin
            return query execute pg_catalog.format('select h.check_name, h.status, h.message, h.hint from autoembed.%I() h', pg_catalog.concat(part, '_health'));
        exception when others then
            check_name := part;
            status := 'warn';
            message := pg_catalog.format('this check could not be made (SQLSTATE %s)', sqlstate);
            hint := null;
            if part operator(pg_catalog.=) 'encoding' then
                status := 'fail';
                message := sqlerrm;
            end if;
            return next;
        end;
    end loop;
end
$$;

create view embedding_health with (security_invoker = true) as
select h.check_name, h.status, h.message, h.hint from autoembed.health() h;
