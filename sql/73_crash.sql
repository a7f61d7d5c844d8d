-- What was in flight when the server crashed: the suspects, which are encoded one by one.

create function autoembed.recover(registration bigint) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
    if exists (select from autoembed.inflight i where i.registration = recover.registration)
        or autoembed.is_crash_due(registration) then
        perform autoembed.request(registration, 'recover');
    end if;
end
$$;

-- Rows in flight whose worker is gone (their lock is free): with the twin there, the worker merely went; without it,
-- the server crashed with them in flight, and they become suspects. Two calls that come upon the same row wait for each
-- other: the second would otherwise encode a suspect that the first is about to blame, and crash the server once more.
create function autoembed.make_suspects(registration bigint) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    f autoembed.inflight;
    crashed boolean;
begin
    -- Before its flights: DROP TABLE takes the registration first, then its flights, and each would wait for the other.
    perform from autoembed.registration r where r.id = make_suspects.registration for key share;
    perform autoembed.suspect_again(registration);
    for f in select * from autoembed.inflight i where i.registration = make_suspects.registration
             and (not autoembed.has_twin(i) or pg_try_advisory_xact_lock(autoembed.flight_lock(i.registration, i.id)))
             order by i.id for update loop
        crashed := not autoembed.has_twin(f) and f.cluster = autoembed.cluster();
        delete from autoembed.inflight i where i.registration = f.registration and i.id = f.id;
        continue when not (found and crashed);
        if f.alone then
            perform autoembed.accuse(f);
        else
            insert into autoembed.suspect as s (registration, key, hash)
            select f.registration, u.key, u.hash from unnest(f.keys, f.hashes) as u (key, hash)
            on conflict on constraint suspect_pkey do update set hash = excluded.hash, crashes = 0, restarts = 0
            where s.hash <> excluded.hash;
        end if;
    end loop;
end
$$;

create function autoembed.has_twin(f autoembed.inflight) returns boolean
language sql stable
begin atomic
    select exists (select from autoembed.inflight_twin w where w.registration = (f).registration and w.id = (f).id);
end;

-- What was encoded alone as the server crashed. Any other backend may have crashed it, by chance: so it is proof only
-- the third time. Where the server's start is another one than the flight's, not a backend crashed but all of it went,
-- in a power cut or an immediate shutdown; that counts half, for a text may also eat up a whole machine's memory.
create function autoembed.accuse(f autoembed.inflight) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    restarted integer := (f.server_start <> pg_postmaster_start_time())::integer;
    proven boolean;
begin
    insert into autoembed.suspect as s (registration, key, hash, crashes, restarts)
    values (f.registration, f.keys[1], f.hashes[1], 1 - restarted, restarted)
    on conflict on constraint suspect_pkey do update set hash = excluded.hash,
        crashes = case when s.hash = excluded.hash then s.crashes else 0 end + excluded.crashes,
        restarts = case when s.hash = excluded.hash then s.restarts else 0 end + excluded.restarts
    returning 2 * s.crashes + s.restarts >= 6 into proven;
    if proven then
        delete from autoembed.suspect s where s.registration = f.registration and s.key = f.keys[1];
        perform autoembed.fail(f.registration, f.keys[1], f.hashes[1], f.hashes[1], 'crashed',
                               'the server crashed each time that this text alone was encoded');
    end if;
end
$$;

create function autoembed.is_crash_due(registration bigint) returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
    return exists (select from autoembed.failure f where f.registration = is_crash_due.registration
                   and f.kind = 'crashed' and f.next_try <= clock_timestamp());
end
$$;

-- A text that crashed the server and is to be tried again: alone, and one more crash is proof enough.
create function autoembed.suspect_again(registration bigint) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
    if not autoembed.is_crash_due(registration) then
        return;
    end if;
    insert into autoembed.suspect (registration, key, hash, crashes)
    select f.registration, f.key, f.hash, 2 from autoembed.failure f
    where f.registration = suspect_again.registration and f.kind = 'crashed' and f.next_try <= clock_timestamp()
    on conflict do nothing;
end
$$;

-- Null for a caller without ownership, too: row-level security shows it none.
create function autoembed.first_suspect(registration bigint, after jsonb) returns jsonb
language sql volatile
begin atomic
    select f.key from autoembed.suspect f join autoembed.registration r on r.id = f.registration
    where f.registration = first_suspect.registration and autoembed.owns(r.relation)
        and (after is null or f.key > after)
    order by f.key
    limit 1;
end;

-- The next suspect, to be claimed alone. One that is not pending any more, or whose text has changed, is none.
create function autoembed.next_suspect(
    s autoembed.column_sql, after jsonb, out key jsonb, out locks bigint[], out inflight bigint)
returns setof record
language plpgsql volatile as $$
declare
    innocent pg_catalog.jsonb;
begin
    s := autoembed.lock_column(s);
    if s.relation is null or not s.enabled or autoembed.first_suspect(s.registration, after) is null then
        return;
    end if;
    execute pg_catalog.format(
        'select pg_catalog.jsonb_agg(d.key) from autoembed.suspect d where d.registration operator(pg_catalog.=) $1
            and not exists (
             select from %s t where %s and %s and autoembed.hash(%s) operator(pg_catalog.=) d.hash)',
        s.rows, s.matching, s.pending, s.content) into innocent using s.registration;
    if innocent is not null then
        perform autoembed.request(s.registration, 'drop suspects', innocent);
    end if;
    key := autoembed.first_suspect(s.registration, after);
    if key is null then
        return;
    end if;
    inflight := pg_catalog.nextval('autoembed.inflight_id_seq');
    locks := autoembed.locks_of(s, inflight, array[key]);
    return next;
end
$$;

create function autoembed.drop_suspects(registration bigint, keys jsonb) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
    delete from autoembed.suspect f where f.registration = drop_suspects.registration
        and f.key = any (autoembed.elements(keys));
end
$$;
