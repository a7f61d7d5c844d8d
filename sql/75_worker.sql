-- A worker looks at the partial indexes, sleeps, and looks again; asleep it holds nothing but its place.

-- Is a row in the partial index? It may be held back by a failure: then a fill finds that out.
-- It waits for no table that somebody holds (an index is built, say): its owner's other tables would wait as well.
create function autoembed.has_pending(s autoembed.shape) returns boolean
language plpgsql volatile
set lock_timeout = '100ms' set enable_seqscan = off set enable_sort = off set enable_bitmapscan = off set jit = off as $$
declare
    found pg_catalog.bool;
begin
    s := autoembed.enter(s);
    if s.relation is null or not s.enabled then
        return false;
    end if;
    execute pg_catalog.format('select exists (select from %s t where %s order by %s limit 1)', s.rows, s.pending, s.ordering) into found;
    return found;
end
$$;

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
    select array(select hashtextextended(format('autoembed worker %s %s', role, n), 0) from generate_series(1, workers) n);
end;

-- One of the current user's places, if one is free.
create function autoembed.take_place(workers integer) returns bigint
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    place bigint;
begin
    -- by its oid, not as regrole, which would fold the name's case
    foreach place in array autoembed.places((select r.oid from pg_roles r where r.rolname = current_user), workers) loop
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

create procedure embed_worker(
    batch integer default 32, max_seconds integer default 3600, workers integer default 1,
    inout embedded bigint default 0, inout failed bigint default 0, inout skipped bigint default 0)
language plpython3u as $$
if "autoembed 1" not in GD: plpy.execute("select autoembed.start()")
return GD["autoembed 1"].embed_worker(batch, max_seconds, workers)
$$;

comment on procedure embed_worker(integer, integer, integer, bigint, bigint, bigint) is
    'fill what is pending in all that the caller owns, and go on doing so for max_seconds (null: until cancelled); not more than `workers` of a role at once';

-- Is anything left of the relation that will be tried, now or after a back-off; and how many rows have failed for good.
create function autoembed.outstanding(relation oid, out pending boolean, out failed bigint)
language plpgsql volatile as $$
declare
    number pg_catalog.int8;
    found record;
begin
    perform autoembed.authorize(relation);
    if not exists (select from autoembed.registration r where r.relation operator(pg_catalog.=) outstanding.relation) then
        perform autoembed.columns(relation);  -- says so
    end if;
    pending := false;
    failed := 0;
    for number in select r.id from autoembed.registration r where r.relation operator(pg_catalog.=) outstanding.relation loop
        select * into found from autoembed.left_over(autoembed.enter(autoembed.shape_of(number)));
        pending := pending or found.pending;
        failed := failed operator(pg_catalog.+) found.failed;
    end loop;
end
$$;

-- One column's. Reads one row more than are held back, so it takes no longer with a million rows pending.
create function autoembed.left_over(s autoembed.shape, out pending boolean, out failed bigint)
language plpgsql volatile
    set enable_seqscan = off set enable_sort = off set enable_bitmapscan = off set jit = off
    set timezone = 'UTC' set intervalstyle = 'postgres' set bytea_output = 'hex' set extra_float_digits = 1 as $$
declare
    keys pg_catalog.jsonb[];
    held pg_catalog.jsonb[] := '{}';
begin
    pending := false;
    failed := 0;
    if s.relation is null then
        return;
    end if;
    execute pg_catalog.format(
        'select pg_catalog.array_agg(c.key) from (select %s as key from %s t where %s and %s order by %s limit $1) c',
        s.key, s.rows, s.pending, autoembed.has_text(s.content), s.ordering)
    into keys using autoembed.held_count(s.registration) operator(pg_catalog.+) 1;
    if keys is null then
        return;
    end if;
    held := autoembed.held_back(s, keys);
    failed := autoembed.failed_for_good(s.registration, held);
    pending := pg_catalog.cardinality(keys) operator(pg_catalog.>) failed;
end
$$;

create function autoembed.held_count(registration bigint) returns bigint
language sql volatile
begin atomic
    select count(*) from (select from autoembed.failure f where f.registration = held_count.registration limit 10000) h;
end;

create function autoembed.failed_for_good(registration bigint, keys jsonb[]) returns bigint
language sql volatile
begin atomic
    select count(*) from autoembed.failure f
    where f.registration = failed_for_good.registration and f.next_try is null and f.key = any (keys);
end;

create procedure embed_wait(relation regclass, timeout interval default '1 minute')
language plpython3u as $$
if "autoembed 1" not in GD: plpy.execute("select autoembed.start()")
GD["autoembed 1"].embed_wait(relation, timeout)
$$;

comment on procedure embed_wait(regclass, interval) is
    'return once no row of the relation is pending or failing; an error when time is up, or when rows have failed for good';

create function autoembed.seconds(duration text) returns double precision
language sql immutable
begin atomic
    select extract(epoch from duration::interval)::double precision;
end;
