-- What was in flight when the server crashed: the suspects, which are encoded one by one.

-- Rows in flight whose worker is gone (their lock is free): with the twin there, the worker merely went; without it,
-- the server crashed with them in flight, and they become suspects. A suspect that crashed the server alone is blamed.
create function autoembed.recover(registration bigint) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    f autoembed.inflight;
    crashed boolean;
begin
    for f in select * from autoembed.inflight i where i.registration = recover.registration
             and pg_try_advisory_xact_lock(autoembed.flight_lock(i.registration, i.id)) loop
        crashed := not exists (select from autoembed.inflight_twin w where w.registration = f.registration and w.id = f.id) and f.cluster = autoembed.cluster();
        delete from autoembed.inflight i where i.registration = f.registration and i.id = f.id;
        continue when not (found and crashed);
        if f.alone then
            perform autoembed.fail(f.registration, f.keys[1], f.hashes[1], 'crashed', 'the server crashed while this text alone was encoded');
            delete from autoembed.suspect s where s.registration = f.registration and s.key = f.keys[1];
        else
            insert into autoembed.suspect (registration, key, hash)
            select f.registration, u.key, u.hash from unnest(f.keys, f.hashes) as u (key, hash)
            on conflict on constraint suspect_pkey do update set hash = excluded.hash;
        end if;
    end loop;
end
$$;

-- null for a caller without ownership, too: row-level security shows him none
create function autoembed.first_suspect(registration bigint, after jsonb) returns jsonb
language sql volatile
begin atomic
    select f.key from autoembed.suspect f join autoembed.registration r on r.id = f.registration
    where f.registration = first_suspect.registration and autoembed.owns(r.relation) and (after is null or f.key > after)
    order by f.key
    limit 1;
end;

-- The next suspect, to be claimed alone. One that is not pending any more, or whose text has changed, is none.
create function autoembed.next_suspect(
    s autoembed.column_sql, after jsonb, out key jsonb, out locks bigint[], out inflight bigint)
returns setof record
language plpgsql volatile as $$
begin
    s := autoembed.lock_column(s);
    if s.relation is null or not s.enabled or autoembed.first_suspect(s.registration, after) is null then
        return;
    end if;
    execute pg_catalog.format(
        'delete from autoembed.suspect d where d.registration operator(pg_catalog.=) $1 and not exists (
             select from %s t where %s and %s and autoembed.hash(%s) operator(pg_catalog.=) d.hash)',
        s.rows, s.matching, s.pending, s.content) using s.registration;
    key := autoembed.first_suspect(s.registration, after);
    if key is null then
        return;
    end if;
    inflight := pg_catalog.nextval('autoembed.inflight_id_seq');
    locks := autoembed.locks_of(s, inflight, array[key]);
    return next;
end
$$;
