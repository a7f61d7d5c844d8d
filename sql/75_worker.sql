-- A worker looks at the partial indexes, sleeps, and looks again; asleep it holds nothing but its place.

-- Is there a row to be tried now, and, where a snapshot is given, one that it does not show?
-- It waits for no table that somebody holds (an index is built, say): its owner's other tables would wait as well.
create function autoembed.has_pending(s autoembed.column_sql, beyond text default null) returns boolean
language plpgsql volatile as $$
begin
    s := autoembed.lock_column_soon(s);
    return s.relation is not null and s.enabled and autoembed.any_due(s, beyond);
end
$$;

create function autoembed.lock_column_soon(s autoembed.column_sql) returns autoembed.column_sql
language plpgsql volatile set search_path = pg_catalog, pg_temp set lock_timeout = '100ms' as $$
begin
    return autoembed.lock_column(s);
end
$$;

-- A row in the partial index may be blank after all, or held back. A thousand are looked at: should none of so many be
-- due, a fill finds out about the others.
create function autoembed.any_due(s autoembed.column_sql, beyond text default null) returns boolean
language plpgsql volatile as $$
declare
    after pg_catalog.jsonb := (select f.key from autoembed.frontier(s) f);
    rows pg_catalog.text;
    found pg_catalog.refcursor;
    due pg_catalog.bool;
begin
    loop
        rows := pg_catalog.concat_ws(' ',
            pg_catalog.format('from %s t where %s', s.rows, s.pending),
            case when after is not null then pg_catalog.format('and %s', s.beyond) end,
            case when beyond is not null then 'and autoembed.is_newer(t.xmin, $3)' end,
            pg_catalog.format('order by %s', s.ordering));
        found := autoembed.open_scan(pg_catalog.format(
            'select exists (select from (select %s as key, %s as content %s limit 1000) c where %s %s) or exists (select %3$s offset 1000 limit 1)',
            s.key, s.content, rows, autoembed.has_text('c.content'),
            case when autoembed.holds_back(s.registration) then
                'and not exists (
                     select from autoembed.failure f
                     where f.registration operator(pg_catalog.=) $2
                         and f.key_hash operator(pg_catalog.=) pg_catalog.jsonb_hash_extended(c.key, 0)
                       and f.key operator(pg_catalog.=) c.key
                           and f.hash operator(pg_catalog.=) autoembed.hash(c.content)
                       and (f.next_try is null
                           or f.next_try operator(pg_catalog.>) pg_catalog.clock_timestamp()))' end),
            after, s.registration, beyond);
        fetch found into due;
        close found;
        exit when due or after is null;
        after := null;  -- nothing behind the frontier: now all rows
    end loop;
    return due;
end
$$;

create function autoembed.snapshot() returns text
language sql volatile
begin atomic
    select pg_current_snapshot()::text;
end;

-- Was the row, which is visible now, written by a transaction that the snapshot does not show?
create function autoembed.is_newer(writer xid, snapshot text) returns boolean
language sql stable
begin atomic
    select not pg_visible_in_snapshot(greatest(n.next - (n.next - writer::text::bigint + 4294967296) % 4294967296,
        3)::text::xid8, snapshot::pg_snapshot)
    from (select pg_snapshot_xmax(pg_current_snapshot())::text::bigint as next) n;
end;

-- Changes when a column is declared, changed, paused or dropped, and when its relation changes hands.
create function autoembed.declarations() returns text
language sql volatile
begin atomic
    select coalesce(string_agg(concat_ws(' ', r.id, r.generation, r.enabled, c.relowner), ',' order by r.id), '')
    from autoembed.registration r join pg_catalog.pg_class c on c.oid = r.relation;
end;

-- The session-level locks of a role's workers in this database: as many places as there may be workers.
create function autoembed.places(role oid, workers integer) returns bigint[]
language sql immutable
begin atomic
    select array(select hashtextextended(format('autoembed worker %s %s', role, n), 0)
        from generate_series(1, workers) n);
end;

create function autoembed.own_places(workers integer) returns bigint[]
language sql stable
begin atomic  -- by the role's oid, not as regrole, which would fold the name's case
    select autoembed.places(r.oid, workers) from pg_catalog.pg_roles r where r.rolname = current_user;
end;

-- One of these places, if one is free.
create function autoembed.take_place(places bigint[]) returns bigint
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    place bigint;
begin
    foreach place in array places loop
        if pg_try_advisory_lock(place) then
            return place;
        end if;
    end loop;
    return null;
end
$$;

create function autoembed.is_working(role oid) returns boolean
language sql stable
begin atomic
    select exists (
        select from unnest(autoembed.places(role, 64)) p
        join pg_catalog.pg_locks l on l.locktype = 'advisory' and l.objsubid = 1
            and l.classid = ((p >> 32) & 4294967295)::oid and l.objid = (p & 4294967295)::oid
        join pg_catalog.pg_database d on d.oid = l.database and d.datname = current_database());
end;

create procedure autoembed.fill_on(
    batch integer, max_seconds integer, workers integer,
    inout embedded bigint, inout failed bigint, inout skipped bigint, inout cached bigint,
        inout refusal autoembed.refusal)
language plpython3u as $$
if "autoembed 1" not in GD: plpy.execute("select autoembed.start()")
return GD["autoembed 1"].fill_on(batch, max_seconds, workers)
$$;

create procedure embed_worker(
    batch integer default null, max_seconds integer default 3600, workers integer default 1,
    inout embedded bigint default 0, inout failed bigint default 0, inout skipped bigint default 0,
    inout cached bigint default 0)
language plpgsql as $$
declare
    refusal autoembed.refusal;
begin
    call autoembed.fill_on(batch, max_seconds, workers, embedded, failed, skipped, cached, refusal);
    perform autoembed.accepted(refusal);
end
$$;

comment on procedure embed_worker(integer, integer, integer, bigint, bigint, bigint, bigint) is
    'Fills what is pending in all that the caller owns, and goes on doing so for max_seconds (null: until it is '
    'cancelled). At most `workers` of a role are at work at once.';

-- Is anything left of the relation that will be tried, now or after a back-off; and how many rows have failed for good.
create function autoembed.outstanding(relation oid, out pending boolean, out failed bigint)
language plpgsql volatile as $$
declare
    number pg_catalog.int8;
    found record;
begin
    perform autoembed.authorize(relation);
    if not exists (select from autoembed.registration r
        where r.relation operator(pg_catalog.=) outstanding.relation) then
        perform autoembed.columns(relation);  -- says so
    end if;
    perform autoembed.check_key(relation);
    pending := false;
    failed := 0;
    for number in select r.id from autoembed.registration r
        where r.relation operator(pg_catalog.=) outstanding.relation loop
        select * into found from autoembed.left_over(autoembed.lock_column(autoembed.column_sql_of(number)));
        pending := pending or found.untried or (found.waiting operator(pg_catalog.>) 0);
        failed := failed operator(pg_catalog.+) found.failed;
    end loop;
end
$$;

-- One column's: is there a row that could be tried now, how many wait for another try, until when, how many have
-- failed. Reads one row more than are held back, so it takes no longer with a million rows pending.
create function autoembed.left_over(
    s autoembed.column_sql, out untried boolean, out waiting bigint, out next_try timestamptz, out failed bigint)
language plpgsql volatile as $$
declare
    found pg_catalog.refcursor;
    keys pg_catalog.jsonb[];
    held pg_catalog.jsonb[];
begin
    untried := false;
    waiting := 0;
    failed := 0;
    if s.relation is null then
        return;
    end if;
    found := autoembed.open_scan(pg_catalog.format(
        'select pg_catalog.array_agg(c.key) from (select %s as key from %s t where %s and %s order by %s limit $2) c',
        s.key, s.rows, s.pending, autoembed.has_text(s.content), s.ordering),
        null, autoembed.held_count(s.registration) operator(pg_catalog.+) 1);
    fetch found into keys;
    close found;
    if keys is null then
        return;
    end if;
    held := autoembed.held_back(s, keys);
    select h.waiting, h.next_try, h.failed into waiting, next_try, failed
        from autoembed.held_rows(s.registration, held) h;
    untried := pg_catalog.cardinality(keys) operator(pg_catalog.>) (waiting operator(pg_catalog.+) failed);
end
$$;

create function autoembed.held_count(registration bigint) returns bigint
language sql volatile
begin atomic
    select count(*) from (select from autoembed.failure f where f.registration = held_count.registration limit 10000) h;
end;

create function autoembed.held_rows(registration bigint, keys jsonb[], out waiting bigint, out next_try timestamptz,
    out failed bigint)
language sql volatile
begin atomic
    select count(f.next_try), min(f.next_try), count(*) - count(f.next_try) from autoembed.failure f
    where f.registration = held_rows.registration and f.key = any (keys);
end;

create procedure autoembed.wait_for(relation oid, label text, timeout interval, seconds double precision,
    inout refusal autoembed.refusal)
language plpython3u as $$
if "autoembed 1" not in GD: plpy.execute("select autoembed.start()")
return GD["autoembed 1"].wait_for(relation, label, timeout, seconds)
$$;

create procedure embed_wait(relation regclass, timeout interval default '1 minute')
language plpgsql as $$
declare
    refusal autoembed.refusal;
begin
    call autoembed.wait_for(relation, relation::pg_catalog.text, timeout,
        extract(epoch from timeout)::pg_catalog.float8, refusal);
    perform autoembed.accepted(refusal);
end
$$;

comment on procedure embed_wait(regclass, interval) is
    'Returns once no row of the relation is pending or failing. It raises an error when time is up, or when rows '
    'have failed for good.';
