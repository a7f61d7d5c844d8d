-- How a batch is embedded: candidates, claim, (the encoder runs, holding nothing), complete, settle, release.
-- embed_pending is the only place that calls them in order, with a commit after claim and after settle.

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
create function autoembed.air_lock() returns bigint
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

-- The columns that a call serves: those of the named relation, or of all relations that the caller owns himself;
-- the one that has waited longest first, so that a call cut short by max_seconds starves nobody.
create function autoembed.columns(
    relation oid default null, out registration bigint, out label text, out model text, out fingerprint text,
    out dimensions integer, out shape text)
returns setof record
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    r record;
    s autoembed.shape;
begin
    if relation is not null then
        perform autoembed.authorize(relation);
        if not exists (select from autoembed.registration g where g.relation = columns.relation) then
            raise exception using errcode = 'undefined_object',
                message = format('relation %s has no column declared for embedding', relation::regclass),
                hint = 'Declare one with embed_column(relation, source, target).';
        end if;
        perform autoembed.check_key(relation);
    end if;
    for r in
        select g.id
        from autoembed.registration g
        join pg_class c on c.oid = g.relation
        where case when columns.relation is null then autoembed.is_own(g.relation)
                   else g.relation = columns.relation end
        order by (select max(u.finished) from autoembed.run u where u.registration = g.id) nulls first, g.id
    loop
        s := autoembed.shape_of(r.id);
        continue when s.relation is null or not s.enabled;
        registration := s.registration;
        label := s.label;
        model := s.model;
        fingerprint := s.fingerprint;
        dimensions := s.dimensions;
        shape := s::text;
        return next;
    end loop;
end
$$;

create function autoembed.holds_back(registration bigint) returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
    return exists (select from autoembed.failure f where f.registration = holds_back.registration)
        or exists (select from autoembed.suspect f where f.registration = holds_back.registration);
end
$$;

create function autoembed.first_of(keys jsonb[], without jsonb[], wanted integer) returns jsonb[]
language sql stable
begin atomic
    select array(select u.key from unnest(keys) with ordinality as u (key, n)
                 where u.key not in (select w.key from unnest(without) as w (key)) order by u.n limit wanted);
end;

create function autoembed.locks_of(s autoembed.shape, inflight bigint, keys jsonb[]) returns bigint[]
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
    return array(select autoembed.row_lock(s.relation, s.target_number, u.key)
                 from unnest(keys) with ordinality as u (key, n) order by u.n)
           || autoembed.flight_lock(s.registration, inflight) || autoembed.air_lock();
end
$$;

create function autoembed.locks_without(s autoembed.shape, keys jsonb[], without jsonb[]) returns bigint[]
language sql stable
begin atomic
    select array(select autoembed.row_lock((s).relation, (s).target_number, u.key) from unnest(keys) as u (key)
                 where u.key not in (select w.key from unnest(without) as w (key)));
end;

-- Written so that each key is looked up by key_hash, whatever the statistics: under row-level security a clause with one
-- of jsonb's functions is no index condition, and a join of the two could read all of the registration's failures.
create function autoembed.held_keys(registration bigint, keys jsonb[], out held jsonb[], out hashes bytea[])
language sql volatile
begin atomic
    select array_agg(f.key), array_agg(f.hash)
    from (select f.key, f.hash
          from (select k.key, jsonb_hash_extended(k.key, 0) as hash from unnest(keys) as k (key) offset 0) u
          cross join lateral (
              select x.key, x.hash from autoembed.failure x
              where x.registration = held_keys.registration and x.key_hash = u.hash and x.key = u.key
                and (x.next_try is null or x.next_try > clock_timestamp())
              offset 0) f
          union all
          select f.key, f.hash from autoembed.suspect f where f.registration = held_keys.registration and f.key = any (keys)) f;
end;

-- Of these keys, those whose text of today has failed and is not to be tried yet, or is a suspect.
create function autoembed.held_back(s autoembed.shape, keys jsonb[]) returns jsonb[]
language plpgsql volatile as $$
declare
    held pg_catalog.jsonb[];
    hashes pg_catalog.bytea[];
begin
    select * into held, hashes from autoembed.held_keys(s.registration, keys);
    if held is null then
        return '{}';
    end if;
    execute pg_catalog.format(
        'select coalesce(pg_catalog.array_agg(d.key), ''{}'') from rows from (pg_catalog.unnest($1), pg_catalog.unnest($2)) as d (key, hash) join %s t on %s
         where autoembed.hash(%s) operator(pg_catalog.=) d.hash', s.rows, s.matching, s.content)
    into held using held, hashes;
    return held;
end
$$;

-- Up to `wanted` keys that are pending and not held back, after the cursor, in key order, and the locks that a claim
-- of them may take. The scan is bounded: rows in back-off move the cursor on and cost no more than that.
-- The planner is bound to the partial index: with old statistics it would sort, or walk another one. jit is off here and
-- below because what is switched off counts as very expensive, and jit would compile for seconds to run in microseconds.
-- The other settings make a key's jsonb, and so its lock and its failures, the same in every session.
create function autoembed.candidates(
    s autoembed.shape, after jsonb, wanted integer,
    out keys jsonb[], out locks bigint[], out cursor jsonb, out passed integer, out inflight bigint)
returns setof record
language plpgsql volatile
    set enable_seqscan = off set enable_sort = off set enable_bitmapscan = off set jit = off
    set timezone = 'UTC' set intervalstyle = 'postgres' set bytea_output = 'hex' set extra_float_digits = 1 as $$
declare
    careful pg_catalog.bool;
    held pg_catalog.jsonb[];
    scan pg_catalog.int4 := wanted;
begin
    s := autoembed.enter(s);
    if s.relation is null or not s.enabled then
        return;
    end if;
    careful := autoembed.holds_back(s.registration);
    loop
        execute pg_catalog.format(
            'select pg_catalog.array_agg(c.key order by c.n)
             from (select %s as key, pg_catalog.row_number() over () as n from %s t where %s %s order by %s limit $2) c',
            s.key, s.rows, s.pending, case when after is not null then pg_catalog.format('and %s', s.beyond) end, s.ordering)
        into keys using after, scan;
        if keys is null then
            return;
        end if;
        passed := pg_catalog.cardinality(keys);
        cursor := keys[passed];
        exit when not careful;
        held := autoembed.held_back(s, keys);
        exit when pg_catalog.cardinality(held) operator(pg_catalog.=) 0;
        if scan operator(pg_catalog.>=) 1024 then
            keys := autoembed.first_of(keys, held, wanted);
            if pg_catalog.cardinality(keys) operator(pg_catalog.=) wanted then
                cursor := keys[wanted];
            end if;
            exit;
        end if;
        scan := 1024;  -- among rows in back-off, look further
    end loop;
    inflight := pg_catalog.nextval('autoembed.inflight_id_seq');
    locks := autoembed.locks_of(s, inflight, keys);
    return next;
end
$$;

-- Where a call begins. No row: with the first one, for no long stretch lies before the rows that are worth a look.
create function autoembed.frontier(s autoembed.shape, out key jsonb, out held boolean)
returns setof record
language sql volatile
begin atomic
    select f.key, f.held from autoembed.frontier f where f.registration = (s).registration and f.beyond = (s).beyond;
end;

-- Rows that were filled leave dead entries in the partial index, some 8 ms a million for each that looks for work,
-- until a vacuum. An estimate: the statistics, which a backend tells when it is idle, and what this one has not told.
create function autoembed.has_many_dead_rows(relation oid) returns boolean
language sql volatile
begin atomic
    select sum(pg_stat_get_dead_tuples(t.oid) + pg_stat_get_xact_tuples_updated(t.oid)) >= 20000
    from (select c.oid from pg_catalog.pg_class c where c.oid = relation
          union all
          select p.relid from pg_catalog.pg_class c, pg_partition_tree(c.oid) p where c.oid = relation and c.relkind = 'p' and p.isleaf) t;
end;

-- For the next call's beginning, a call says behind which key no row was held back, and where the last row was that it
-- saw. A caller who may not write state leaves it as it is, as does one whose column was dropped meanwhile.
create function autoembed.set_frontier(s autoembed.shape, key jsonb, last jsonb) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    held boolean := key is not null;
begin
    if autoembed.owns((select r.relation from autoembed.registration r where r.id = s.registration)) is not true then
        return;
    end if;
    if not held and autoembed.has_many_dead_rows(s.relation) then
        key := last;
    end if;
    if key is null then
        delete from autoembed.frontier f where f.registration = s.registration;
    else
        insert into autoembed.frontier as f values (s.registration, key, s.beyond, held)
        on conflict on constraint frontier_pkey do update set key = excluded.key, beyond = excluded.beyond, held = excluded.held
        where (f.key, f.beyond, f.held) is distinct from (excluded.key, excluded.beyond, excluded.held);
    end if;
end
$$;

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

create function autoembed.try_locks(s autoembed.shape, inflight bigint, wanted jsonb[]) returns jsonb[]
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
    perform pg_try_advisory_lock(autoembed.flight_lock(s.registration, inflight));
    return array(select u.key from unnest(wanted) with ordinality as u (key, n)
                 where pg_try_advisory_lock(autoembed.row_lock(s.relation, s.target_number, u.key)) order by u.n);
end
$$;

-- Without ownership no state is written: a role with UPDATE alone could otherwise hold back others' rows.
create function autoembed.take_off(s autoembed.shape, inflight bigint, alone boolean, keys jsonb[], hashes bytea[]) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
    if not autoembed.owns(s.relation) then
        return;
    end if;
    insert into autoembed.inflight (id, registration, cluster, alone, keys, hashes)
    values (inflight, s.registration, autoembed.cluster(), alone, keys, hashes);
    insert into autoembed.inflight_twin values (s.registration, inflight);
    -- lost with the crash that it must outlive, the row would blame nobody and the server would crash again
    if current_setting('synchronous_commit') = 'off' then
        perform set_config('synchronous_commit', 'local', true);
    end if;
end
$$;

-- Lock candidates, then read again: the statement that found them saw the table before it held their locks, so some
-- may be filled by now. Those are unlocked. An inflight row says what is about to be encoded. The caller commits.
create function autoembed.claim(
    s autoembed.shape, inflight bigint, wanted jsonb[], alone boolean,
    out generation bigint, out keys jsonb[], out contents text[], out hashes bytea[], out lost integer)
returns setof record
language plpgsql volatile set enable_seqscan = off set jit = off as $$
declare
    mine pg_catalog.jsonb[];
begin
    if alone then
        perform pg_catalog.pg_advisory_lock(autoembed.air_lock());
    else
        perform pg_catalog.pg_advisory_lock_shared(autoembed.air_lock());
    end if;
    s := autoembed.enter(s);
    if s.relation is null then
        return;
    end if;
    mine := autoembed.try_locks(s, inflight, wanted);
    execute pg_catalog.format(
        'select coalesce(pg_catalog.array_agg(c.key), ''{}''), coalesce(pg_catalog.array_agg(c.content), ''{}''),
                coalesce(pg_catalog.array_agg(autoembed.hash(c.content)), ''{}'')
         from (select d.key, %1$s as content from pg_catalog.unnest($1) as d (key) join %2$s t on %3$s where %4$s) c
         where c.content collate pg_catalog."C" operator(pg_catalog.~) ''[^[:space:]]''',
        s.content, s.rows, s.matching, s.pending)
    into keys, contents, hashes using mine;
    if pg_catalog.cardinality(keys) operator(pg_catalog.<) pg_catalog.cardinality(mine) then
        perform autoembed.release(autoembed.locks_without(s, mine, keys));
    end if;
    generation := s.generation;
    lost := pg_catalog.cardinality(wanted) operator(pg_catalog.-) pg_catalog.cardinality(mine);
    if pg_catalog.cardinality(keys) operator(pg_catalog.>) 0 then
        perform autoembed.take_off(s, inflight, alone, keys, hashes);
    end if;
    return next;
end
$$;

-- Write the vectors whose rows are still as they were claimed; a row that somebody holds is not waited for.
-- Returns the keys that were written; the others come again. So does a row whose text one of the user's own triggers
-- changed in this very write: the vector is the former text's, and goes at once.
create function autoembed.complete(
    s autoembed.shape, generation bigint, keys jsonb[], hashes bytea[], vectors text[])
returns jsonb[]
language plpgsql volatile set enable_seqscan = off set jit = off as $$
declare
    written pg_catalog.jsonb[];
    changed pg_catalog.jsonb[];
begin
    s := autoembed.enter(s);
    if s.relation is null or s.generation operator(pg_catalog.<>) generation then
        return '{}';
    end if;
    execute pg_catalog.format(
        'with encoded as materialized (
             select d.key, d.hash, d.vector from rows from (pg_catalog.unnest($1), pg_catalog.unnest($2), pg_catalog.unnest($3)) as d (key, hash, vector)
         ), free as materialized (
             select d.key, d.vector from encoded d join %1$s t on %2$s
             where t.%3$s is null and autoembed.hash(%4$s) operator(pg_catalog.=) d.hash
             for no key update of t skip locked
         ), written as (
             update %1$s as t set %3$s = d.vector::%5$s from free d where %2$s and t.%3$s is null
             returning d.key, autoembed.hash(%4$s) operator(pg_catalog.=) (
                 select e.hash from encoded e where e.key operator(pg_catalog.=) d.key) as same
         )
         select coalesce(pg_catalog.array_agg(w.key) filter (where w.same), ''{}''),
                pg_catalog.array_agg(w.key) filter (where w.same is not true) from written w',
        s.rows, s.matching, s.target, s.content, s.type)
    into written, changed using keys, hashes, vectors;
    if changed is not null then
        execute pg_catalog.format(
            'update %s as t set %s = null from pg_catalog.unnest($1) as d (key) where %s', s.rows, s.target, s.matching)
        using changed;
    end if;
    return written;
end
$$;

create function autoembed.is_constraint(name text) returns boolean
language sql stable
begin atomic
    select exists (select from pg_catalog.pg_constraint c where c.conname = name::name)
        or exists (select from pg_catalog.pg_index i join pg_catalog.pg_class c on c.oid = i.indexrelid
                   where i.indisunique and c.relname = name::name);
end;

-- When a failed text is tried next: 30 s, 1, 2, 4 minutes; after the fifth try it stays failed.
create function autoembed.next_try(kind text, attempts integer) returns timestamptz
language sql volatile
begin atomic
    select case when kind <> 'crashed' and attempts < 5
        then clock_timestamp() + '30 seconds'::interval * 2 ^ (attempts - 1) end;
end;

create function autoembed.fail(registration bigint, key jsonb, hash bytea, kind text, message text) returns void
language sql volatile
begin atomic
    insert into autoembed.failure as f (registration, key, hash, kind, message, next_try)
    values (registration, key, hash, kind, message, autoembed.next_try(kind, 1))
    on conflict on constraint failure_pkey do update
    set hash = excluded.hash, kind = excluded.kind, message = excluded.message, last_try = clock_timestamp(),
        attempts = case when f.hash = excluded.hash then f.attempts + 1 else 1 end,
        next_try = autoembed.next_try(excluded.kind, case when f.hash = excluded.hash then f.attempts + 1 else 1 end);
end;

-- Key by key, for the reason that held_keys has.
create function autoembed.clear_records(registration bigint, keys jsonb[]) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    failures boolean := exists (select from autoembed.failure f where f.registration = clear_records.registration);
    truncations boolean := exists (select from autoembed.truncation f where f.registration = clear_records.registration);
    k jsonb;
begin
    foreach k in array keys loop
        if failures then
            delete from autoembed.failure f
            where f.registration = clear_records.registration and f.key_hash = jsonb_hash_extended(k, 0) and f.key = k;
        end if;
        if truncations then
            delete from autoembed.truncation f
            where f.registration = clear_records.registration and f.key_hash = jsonb_hash_extended(k, 0) and f.key = k;
        end if;
    end loop;
end
$$;

-- The round's record, in the transaction of its vectors: failures, truncations, figures; and the end of the flight.
create function autoembed.settle(
    registration bigint, inflight bigint, handled jsonb[], written jsonb[],
    failures jsonb,         -- [{"key", "hash" in hex, "kind", "message"}, …]
    truncations jsonb,      -- [{"key", "tokens", "limit"}, …]
    figures jsonb)          -- {"tokens", and the seconds in "claim", "encode", "write"}
returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    r autoembed.registration;
    bad integer := jsonb_array_length(failures);
begin
    select * into r from autoembed.registration g where g.id = settle.registration;
    if r.id is null or not autoembed.owns(r.relation) then
        return;
    end if;
    delete from autoembed.inflight f where f.registration = r.id and f.id = settle.inflight;
    delete from autoembed.suspect f where f.registration = r.id and f.key = any (handled);
    perform autoembed.clear_records(r.id, written);
    perform autoembed.fail(r.id, u.key, decode(u.hash, 'hex'), u.kind, u.message)
    from jsonb_to_recordset(failures) as u (key jsonb, hash text, kind text, message text);
    insert into autoembed.truncation (registration, key, tokens, token_limit)
    select r.id, u.key, u.tokens, u."limit"
    from jsonb_to_recordset(truncations) as u (key jsonb, tokens integer, "limit" integer)
    where u.key = any (written);
    if cardinality(handled) > 0 then
        insert into autoembed.run (registration, model, embedded, failed, skipped, tokens, claim_seconds, encode_seconds, write_seconds)
        values (r.id, r.model, cardinality(written), bad, cardinality(handled) - cardinality(written) - bad,
                (figures ->> 'tokens')::bigint, (figures ->> 'claim')::double precision,
                (figures ->> 'encode')::double precision, (figures ->> 'write')::double precision);
    end if;
end
$$;

create function autoembed.forget(registration bigint, inflight bigint) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
    delete from autoembed.inflight f where f.registration = forget.registration and f.id = forget.inflight;
end
$$;

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
    s autoembed.shape, after jsonb, out key jsonb, out locks bigint[], out inflight bigint)
returns setof record
language plpgsql volatile as $$
begin
    s := autoembed.enter(s);
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

-- false where the caller may not write state
create function autoembed.tidy_runs(registration bigint) returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
    if not autoembed.owns((select r.relation from autoembed.registration r where r.id = registration)) then
        return false;
    end if;
    delete from autoembed.run u where u.registration = tidy_runs.registration and u.finished < clock_timestamp() - '1 day'::interval;
    return true;
end
$$;

-- Housekeeping at the end of a call: failures and truncations of rows that are gone, figures older than a day.
-- A thousand a time, those first that were looked at longest ago.
create function autoembed.tidy(s autoembed.shape) returns void
language plpgsql volatile as $$
declare
    kind pg_catalog.text;
begin
    s := autoembed.enter(s);
    if s.relation is null or not autoembed.tidy_runs(s.registration) then
        return;
    end if;
    foreach kind in array array['failure', 'truncation'] loop
        execute pg_catalog.format(
            'with oldest as materialized (
                 select d.key, d.key_hash, exists (select from %2$s t where %3$s) as there
                 from (select o.key, o.key_hash from autoembed.%1$I o
                       where o.registration operator(pg_catalog.=) $1
                         and o.checked operator(pg_catalog.<) (pg_catalog.clock_timestamp() operator(pg_catalog.-) ''1 minute''::pg_catalog.interval)
                       order by o.checked limit 1000) d
             ), gone as (
                 delete from autoembed.%1$I f using oldest d
                 where f.registration operator(pg_catalog.=) $1 and f.key_hash operator(pg_catalog.=) d.key_hash
                   and f.key operator(pg_catalog.=) d.key and not d.there
             )
             update autoembed.%1$I f set checked = pg_catalog.clock_timestamp() from oldest d
             where f.registration operator(pg_catalog.=) $1 and f.key_hash operator(pg_catalog.=) d.key_hash
               and f.key operator(pg_catalog.=) d.key and d.there', kind, s.rows, s.matching) using s.registration;
    end loop;
end
$$;
