-- The advisory locks of the product. They are session locks: they outlive the commits of a fill.

-- One number space for all advisory locks of the product: rows, rows in flight, and the air space itself.
create function autoembed.row_lock(relation oid, target smallint, key jsonb) returns bigint
language sql immutable
begin atomic
    select hashtextextended(format('autoembed row %s %s %s', relation, target, key), 0);
end;

create function autoembed.flight_lock(registration bigint, inflight bigint) returns bigint
language sql immutable
begin atomic
    select hashtextextended(format('autoembed flight %s %s', registration, inflight), 0);
end;

-- Held shared by each batch in flight, exclusively by a suspect: it flies alone, so that a crash is its own.
create function autoembed.solo_lock() returns bigint
language sql immutable
begin atomic
    select hashtextextended('autoembed air', 0);
end;

-- Which cluster a row in flight belongs to: after a restore from backup or a promotion its crash is none of ours.
create function autoembed.cluster() returns text
language sql stable
begin atomic
    select format('%s/%s', (select c.system_identifier from pg_catalog.pg_control_system() c),
                  left(pg_walfile_name(pg_current_wal_lsn()), 8));
end;

create function autoembed.locks_of(s autoembed.column_sql, inflight bigint, keys jsonb[]) returns bigint[]
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
    return array(select autoembed.row_lock(s.relation, s.target_number, u.key)
                 from unnest(keys) with ordinality as u (key, n) order by u.n)
           || autoembed.flight_lock(s.registration, inflight) || autoembed.solo_lock();
end
$$;

create function autoembed.locks_without(s autoembed.column_sql, keys jsonb[], without jsonb[]) returns bigint[]
language sql stable
begin atomic
    select array(select autoembed.row_lock((s).relation, (s).target_number, u.key) from unnest(keys) as u (key)
                 where u.key not in (select w.key from unnest(without) as w (key)));
end;

-- Unlock those of these locks that this session holds: exactly what a claim took, also when an error cut it short
-- and nobody knows how far it came. Never pg_advisory_unlock_all: the application may hold locks of its own.
create function autoembed.release(locks bigint[]) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
    perform case p.mode when 'ShareLock' then pg_advisory_unlock_shared(u.lock) else pg_advisory_unlock(u.lock) end
    from (select distinct l.lock from unnest(locks) as l (lock)) u
    join pg_locks p
        on p.locktype = 'advisory' and p.pid = pg_backend_pid() and p.objsubid = 1
       and p.classid = ((u.lock >> 32) & 4294967295)::oid and p.objid = (u.lock & 4294967295)::oid;
end
$$;

create function autoembed.try_locks(s autoembed.column_sql, inflight bigint, wanted jsonb[]) returns jsonb[]
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
    perform pg_try_advisory_lock(autoembed.flight_lock(s.registration, inflight));
    return array(select u.key from unnest(wanted) with ordinality as u (key, n)
                 where pg_try_advisory_lock(autoembed.row_lock(s.relation, s.target_number, u.key)) order by u.n);
end
$$;
