-- State is local to its server. A publication FOR ALL TABLES publishes it as well: what came from another server would
-- name that server's tables by its oids, and its keys would collide with those that are here already, which stops the
-- subscription for all tables. So nothing that is replicated is written.

-- Fires in sessions whose role is replica. Those of a client (pg_restore, a loader) declare and fill as any other.
create function autoembed.keep_local() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
    if (select a.backend_type from pg_stat_get_activity(pg_backend_pid()) a) <> 'client backend' then
        return null;
    elsif tg_op = 'DELETE' then
        return old;
    end if;
    return new;
end
$$;

do $$
declare
    state regclass;
begin
    for state in
        select c.oid from pg_catalog.pg_class c
        where c.relnamespace = 'autoembed'::regnamespace and c.relkind = 'r' and c.relpersistence = 'p'
    loop
        execute format('create trigger keep_local before insert or update or delete on %s
                        for each row execute function autoembed.keep_local()', state);
        execute format('alter table %s enable replica trigger keep_local', state);
    end loop;
end
$$;
