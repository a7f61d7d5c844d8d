-- The first transaction of a batch: it finds candidates, locks them, reads them again, and says what is in flight.
-- Then the encoder runs and holds nothing. embed_pending calls these in order, with a commit after the claim.

-- The columns that a call serves: those of the named relation, or of all relations that the caller itself owns;
-- the one that has waited longest first, so that a call cut short by max_seconds starves nobody.
create function autoembed.columns(
    relation oid default null, out registration bigint, out label text, out model text, out fingerprint text,
    out dimensions integer, out column_sql text)
returns setof record
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    r record;
    s autoembed.column_sql;
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
        s := autoembed.column_sql_of(r.id);
        continue when s.relation is null or not s.enabled;
        registration := s.registration;
        label := s.label;
        model := s.model;
        fingerprint := s.fingerprint;
        dimensions := s.dimensions;
        column_sql := s::text;
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

-- Written so that each key is looked up by key_hash, whatever the statistics: under row-level security a clause with
-- one of jsonb's functions is no index condition, and a join of the two could read all of the registration's failures.
create function autoembed.held_keys(registration bigint, keys jsonb[], out held jsonb[], out hashes bytea[])
language sql volatile
begin atomic
    select array_agg(f.key), array_agg(f.hash)
    from (select f.key, f.hash
          from (select k.key, jsonb_hash_extended(k.key, 0) as hash from unnest(keys) as k (key) offset 0) u
          cross join lateral (
              select x.key, x.hash from autoembed.failure x
              where x.registration = held_keys.registration and x.key_hash = u.hash and x.key = u.key
                and (x.next_try is null or x.next_try > clock_timestamp() or x.kind = 'crashed')
              offset 0) f
          union all
          select f.key, f.hash from autoembed.suspect f where f.registration = held_keys.registration
              and f.key = any (keys)) f;
end;

-- Of these keys, those whose text of today has failed and is not to be tried yet, or is a suspect.
create function autoembed.held_back(s autoembed.column_sql, keys jsonb[]) returns jsonb[]
language plpgsql volatile as $$
declare
    held pg_catalog.jsonb[];
    hashes pg_catalog.bytea[];
    found pg_catalog.refcursor;
begin
    select * into held, hashes from autoembed.held_keys(s.registration, keys);
    if held is null then
        return '{}';
    end if;
    found := autoembed.open_lookup(pg_catalog.format(
        'select coalesce(pg_catalog.array_agg(d.key), ''{}'')
         from rows from (pg_catalog.unnest($1), pg_catalog.unnest($2)) as d (key, hash) join %s t on %s
         where autoembed.hash(%s) operator(pg_catalog.=) d.hash', s.rows, s.matching, s.content), held, hashes);
    fetch found into held;
    close found;
    return held;
end
$$;

-- Up to `wanted` keys that are pending and not held back, after the cursor, in key order, and the locks that a claim
-- of them may take. The scan is bounded: rows in back-off move the cursor on and cost no more than that.
create function autoembed.candidates(
    s autoembed.column_sql, after jsonb, wanted integer,
    out keys jsonb[], out locks bigint[], out cursor jsonb, out passed integer, out inflight bigint)
returns setof record
language plpgsql volatile as $$
declare
    careful pg_catalog.bool;
    held pg_catalog.jsonb[];
    scan pg_catalog.int4 := wanted;
    found pg_catalog.refcursor;
begin
    s := autoembed.lock_column(s);
    if s.relation is null or not s.enabled then
        return;
    end if;
    careful := autoembed.holds_back(s.registration);
    loop
        found := autoembed.open_scan(pg_catalog.format(
            'select pg_catalog.array_agg(c.key order by c.n)
             from (select %s as key, pg_catalog.row_number() over () as n from %s t where %s %s
                 order by %s limit $2) c',
            s.key, s.rows, s.pending, case when after is not null then pg_catalog.format('and %s', s.beyond) end,
                s.ordering),
            after, scan);
        fetch found into keys;
        close found;
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

-- Without ownership no state is written: a role with UPDATE alone could otherwise hold back others' rows.
create function autoembed.record_inflight(s autoembed.column_sql, inflight bigint, alone boolean, keys jsonb[],
    hashes bytea[]) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
    perform autoembed.request(s.registration, 'record inflight', jsonb_build_object(
        'id', inflight, 'alone', alone, 'keys', keys, 'hashes',
            array(select encode(u.hash, 'hex') from unnest(hashes) as u (hash))));
    -- lost with the crash that it must outlive, the row would blame nobody and the server would crash again
    if current_setting('synchronous_commit') = 'off' then
        perform set_config('synchronous_commit', 'local', true);
    end if;
end
$$;

create function autoembed.write_inflight(registration bigint, flight jsonb) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
    insert into autoembed.inflight (id, registration, cluster, alone, keys, hashes)
    values ((flight ->> 'id')::bigint, registration, autoembed.cluster(), (flight ->> 'alone')::boolean,
        autoembed.elements(flight -> 'keys'),
            array(select decode(u.hash, 'hex')
                from jsonb_array_elements_text(flight -> 'hashes') with ordinality as u (hash, n) order by u.n));
    insert into autoembed.inflight_twin values (registration, (flight ->> 'id')::bigint);
end
$$;

-- Lock candidates, then read again: the statement that found them saw the table before it held their locks, so some
-- may be filled by now. Those are unlocked. An inflight row says what is about to be encoded. The caller commits.
create function autoembed.claim(
    s autoembed.column_sql, inflight bigint, wanted jsonb[], alone boolean,
    out generation bigint, out keys jsonb[], out contents text[], out hashes bytea[], out lost integer)
returns setof record
language plpgsql volatile as $$
declare
    mine pg_catalog.jsonb[];
    found pg_catalog.refcursor;
begin
    if alone then
        perform pg_catalog.pg_advisory_lock(autoembed.solo_lock());
    else
        perform pg_catalog.pg_advisory_lock_shared(autoembed.solo_lock());
    end if;
    s := autoembed.lock_column(s);
    if s.relation is null then
        return;
    end if;
    mine := autoembed.try_locks(s, inflight, wanted);
    found := autoembed.open_lookup(pg_catalog.format(
        'select coalesce(pg_catalog.array_agg(c.key), ''{}''), coalesce(pg_catalog.array_agg(c.content), ''{}''),
                coalesce(pg_catalog.array_agg(autoembed.hash(c.content)), ''{}'')
         from (select d.key, %1$s as content from pg_catalog.unnest($1) as d (key) join %2$s t on %3$s where %4$s) c
         where c.content collate pg_catalog."C" operator(pg_catalog.~) ''[^[:space:]]''',
        s.content, s.rows, s.matching, s.pending), mine);
    fetch found into keys, contents, hashes;
    close found;
    if pg_catalog.cardinality(keys) operator(pg_catalog.<) pg_catalog.cardinality(mine) then
        perform autoembed.release(autoembed.locks_without(s, mine, keys));
    end if;
    generation := s.generation;
    lost := pg_catalog.cardinality(wanted) operator(pg_catalog.-) pg_catalog.cardinality(mine);
    if pg_catalog.cardinality(keys) operator(pg_catalog.>) 0 then
        perform autoembed.record_inflight(s, inflight, alone, keys, hashes);
    end if;
    return next;
end
$$;
