-- The second transaction of a batch: it writes the vectors, and records what became of each row.

-- Writes the vectors whose rows are still as they were claimed; a row that somebody holds is not waited for. Returns the
-- keys of the rows that have their vectors now; and those that a trigger of the table keeps from it, each with the hash
-- of the text that the trigger has left there, null where it left no row. All others come again.
-- The setting autoembed.fill tells the row trigger that it is the fill that brings vectors; it holds while this runs.
create function autoembed.complete(
    s autoembed.column_sql, generation bigint, keys jsonb[], hashes bytea[], vectors text[], ends_transaction boolean,
    out written jsonb[], out refused jsonb[], out left_hashes bytea[])
language plpgsql volatile set autoembed.fill = 'on' as $$
declare
    wrote pg_catalog.refcursor;
    doubtful pg_catalog.jsonb[];
    tables pg_catalog.oid[];
begin
    written := '{}';
    refused := '{}';
    left_hashes := '{}';
    s := autoembed.lock_column(s);
    if s.relation is null or s.generation operator(pg_catalog.<>) generation then
        return;
    end if;
    wrote := autoembed.open_lookup(pg_catalog.format(
        'with encoded as materialized (
             select d.key, d.hash, d.vector from rows from (pg_catalog.unnest($1), pg_catalog.unnest($2), pg_catalog.unnest($3)) as d (key, hash, vector)
         ), free as materialized (
             select d.key, d.hash, d.vector from encoded d join %1$s t on %2$s
             where t.%3$s is null and autoembed.hash(%4$s) operator(pg_catalog.=) d.hash
             for no key update of t skip locked
         ), written as (
             update %1$s as t set %3$s = d.vector::%5$s from free d where %2$s and t.%3$s is null
             returning d.key, t.tableoid, t.%3$s is not null and autoembed.hash(%4$s) operator(pg_catalog.=) d.hash as stays
         )
         select coalesce(pg_catalog.array_agg(w.key) filter (where w.stays), ''{}''), pg_catalog.array_agg(distinct w.tableoid),
                case when pg_catalog.count(*) filter (where w.stays) operator(pg_catalog.<) (select pg_catalog.count(*) from free)
                    then (select pg_catalog.array_agg(f.key) from free f) end
         from written w',
        s.rows, s.matching, s.target, s.content, s.type), keys, hashes, vectors);
    fetch wrote into written, tables, doubtful;
    close wrote;
    if doubtful is not null or autoembed.has_late_triggers(s.relation, tables) then
        doubtful := coalesce(doubtful, written);
        if ends_transaction then
            set constraints all immediate;  -- a deferred trigger may undo it as well
        end if;
        select * into written, refused, left_hashes
        from autoembed.look_again(s, doubtful, autoembed.hashes_of(doubtful, keys, hashes));
    end if;
end
$$;

create function autoembed.hashes_of(wanted jsonb[], keys jsonb[], hashes bytea[]) returns bytea[]
language sql immutable
begin atomic
    select array_agg(d.hash order by w.n)
    from unnest(wanted) with ordinality as w (key, n) join unnest(keys, hashes) as d (key, hash) on d.key = w.key;
end;

-- Do triggers of the user's own fire after the write of a row?
create function autoembed.has_late_triggers(relation oid, written oid[]) returns boolean
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
    return exists (
        select from pg_trigger t
        where t.tgrelid = any (written || relation) and not t.tgisinternal
          and t.tgtype & 18 = 16  -- update, and not before
          and t.tgfoid <> 'autoembed.embed_rows()'::regprocedure);
end
$$;

-- What the table's triggers made of these rows. Where they have changed a text, the vector is the former text's, and goes.
create function autoembed.look_again(
    s autoembed.column_sql, keys jsonb[], hashes bytea[], out written jsonb[], out refused jsonb[], out left_hashes bytea[])
language plpgsql volatile as $$
declare
    found pg_catalog.refcursor;
    stale pg_catalog.jsonb[];
    stale_hashes pg_catalog.bytea[];
begin
    found := autoembed.open_lookup(pg_catalog.format(
        'with row as (
             select d.key, d.hash, autoembed.hash(%1$s) as left_hash, t.%2$s is not null as filled
             from rows from (pg_catalog.unnest($1), pg_catalog.unnest($2)) as d (key, hash) join %3$s t on %4$s
         ), outcome as (
             select r.key, r.left_hash, r.filled, r.filled and r.hash operator(pg_catalog.=) r.left_hash as stays from row r
         )
         select coalesce(pg_catalog.array_agg(o.key) filter (where o.stays), ''{}''),
                coalesce(pg_catalog.array_agg(o.key) filter (where not o.filled), ''{}''),
                coalesce(pg_catalog.array_agg(o.left_hash) filter (where not o.filled), ''{}''),
                pg_catalog.array_agg(o.key) filter (where o.filled and o.stays is not true)
         from outcome o', s.content, s.target, s.rows, s.matching), keys, hashes);
    fetch found into written, refused, left_hashes, stale;
    close found;
    if stale is not null then
        found := autoembed.open_lookup(pg_catalog.format(
            'with cleared as (
                 update %s as t set %s = null from pg_catalog.unnest($1) as d (key) where %s returning d.key, autoembed.hash(%s) as left_hash
             )
             select pg_catalog.array_agg(c.key), pg_catalog.array_agg(c.left_hash) from cleared c',
            s.rows, s.target, s.matching, s.content), stale);
        fetch found into stale, stale_hashes;
        close found;
        refused := refused operator(pg_catalog.||) stale;
        left_hashes := left_hashes operator(pg_catalog.||) stale_hashes;
    end if;
end
$$;

create function autoembed.is_constraint(name text) returns boolean
language sql stable
begin atomic
    select exists (select from pg_catalog.pg_constraint c where c.conname = name::name)
        or exists (select from pg_catalog.pg_index i join pg_catalog.pg_class c on c.oid = i.indexrelid
                   where i.indisunique and c.relname = name::name);
end;

-- When a failed text is tried next: after 30 s, 1, 2, 4 minutes, or a day where it crashed the server; after the fifth
-- try it stays failed.
create function autoembed.next_try(kind text, attempts integer) returns timestamptz
language sql volatile
begin atomic
    select case when attempts < 5 then clock_timestamp() + case kind
        when 'crashed' then '1 day'::interval
        else '30 seconds'::interval * 2 ^ (attempts - 1) end end;
end;

-- `hash` is of the text that is held back; the one that was `tried` is another where a trigger changes the text.
create function autoembed.fail(registration bigint, key jsonb, tried bytea, hash bytea, kind text, message text) returns void
language sql volatile
begin atomic
    insert into autoembed.failure as f (registration, key, hash, kind, message, next_try)
    values (registration, key, hash, kind, message, autoembed.next_try(kind, 1))
    on conflict on constraint failure_pkey do update
    set hash = excluded.hash, kind = excluded.kind, message = excluded.message, last_try = clock_timestamp(),
        attempts = case when f.hash = fail.tried then f.attempts + 1 else 1 end,
        next_try = autoembed.next_try(excluded.kind, case when f.hash = fail.tried then f.attempts + 1 else 1 end);
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
    failures jsonb,         -- [{"key", "tried" and "hash" in hex, "kind", "message"}, ...]
    truncations jsonb,      -- [{"key", "tokens", "limit"}, ...]
    figures jsonb)          -- {"tokens", and the seconds in "claim", "encode", "write"}
returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
    perform autoembed.request(registration, 'settle', jsonb_build_object(
        'inflight', inflight, 'handled', handled, 'written', written, 'failures', failures, 'truncations', truncations, 'figures', figures));
end
$$;

create function autoembed.write_outcome(registration bigint, outcome jsonb) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    r autoembed.registration;
    handled jsonb[] := autoembed.elements(outcome -> 'handled');
    written jsonb[] := autoembed.elements(outcome -> 'written');
    bad integer := jsonb_array_length(outcome -> 'failures');
    figures jsonb := outcome -> 'figures';
begin
    select * into r from autoembed.registration g where g.id = write_outcome.registration;
    perform autoembed.drop_inflight(r.id, outcome);
    delete from autoembed.suspect f where f.registration = r.id and f.key = any (handled);
    perform autoembed.clear_records(r.id, written);
    perform autoembed.fail(r.id, u.key, decode(u.tried, 'hex'), decode(u.hash, 'hex'), u.kind, u.message)
    from jsonb_to_recordset(outcome -> 'failures') as u (key jsonb, tried text, hash text, kind text, message text);
    insert into autoembed.truncation (registration, key, tokens, token_limit)
    select r.id, u.key, u.tokens, u."limit"
    from jsonb_to_recordset(outcome -> 'truncations') as u (key jsonb, tokens integer, "limit" integer)
    where u.key = any (written);
    if cardinality(handled) > 0 then
        insert into autoembed.run (registration, model, embedded, failed, skipped, tokens, claim_seconds, encode_seconds, write_seconds)
        values (r.id, r.model, cardinality(written), bad, cardinality(handled) - cardinality(written) - bad,
                (figures ->> 'tokens')::bigint, (figures ->> 'claim')::double precision,
                (figures ->> 'encode')::double precision, (figures ->> 'write')::double precision);
    end if;
    if (outcome ->> 'inflight')::bigint = 0 then  -- immediate mode, where no call comes to its end and tidies
        delete from autoembed.run u where u.id in (
            select o.id from autoembed.run o
            where o.registration = r.id and o.finished < clock_timestamp() - '1 day'::interval
            order by o.finished limit 2 for update skip locked);
    end if;
end
$$;

create function autoembed.forget(registration bigint, inflight bigint) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
    if exists (select from autoembed.inflight f where f.registration = forget.registration and f.id = forget.inflight) then
        perform autoembed.request(registration, 'forget inflight', jsonb_build_object('inflight', inflight));
    end if;
end
$$;

create function autoembed.drop_inflight(registration bigint, flight jsonb) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
    delete from autoembed.inflight f where f.registration = drop_inflight.registration and f.id = (flight ->> 'inflight')::bigint;
end
$$;

-- Housekeeping at the end of a call: failures and truncations of rows that are gone, figures older than a day.
create function autoembed.tidy(s autoembed.column_sql) returns void
language plpgsql volatile as $$
declare
    checked pg_catalog.jsonb;
begin
    s := autoembed.lock_column(s);
    if s.relation is null or not autoembed.owns(s.relation) then
        return;
    end if;
    checked := pg_catalog.jsonb_build_object('failure', autoembed.check_records(s, 'failure'),
                                             'truncation', autoembed.check_records(s, 'truncation'));
    if checked operator(pg_catalog.<>) '{"failure": null, "truncation": null}' or autoembed.has_old_runs(s.registration) then
        perform autoembed.request(s.registration, 'tidy', checked);
    end if;
end
$$;

create function autoembed.has_old_runs(registration bigint) returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
    return exists (select from autoembed.run u where u.registration = has_old_runs.registration
                   and u.finished < clock_timestamp() - '1 day'::interval);
end
$$;

-- Which of a thousand failures or truncations, those that were looked at longest ago, are of rows that are still there?
create function autoembed.check_records(s autoembed.column_sql, kind text) returns jsonb
language plpgsql volatile as $$
declare
    checked pg_catalog.jsonb;
begin
    execute pg_catalog.format(
        'select pg_catalog.jsonb_agg(pg_catalog.jsonb_build_object(''key'', d.key, ''there'', exists (select from %s t where %s)))
         from (select o.key from autoembed.%I o
               where o.registration operator(pg_catalog.=) $1
                 and o.checked operator(pg_catalog.<) (pg_catalog.clock_timestamp() operator(pg_catalog.-) ''1 minute''::pg_catalog.interval)
               order by o.checked limit 1000) d', s.rows, s.matching, kind)
    into checked using s.registration;
    return checked;
end
$$;

create function autoembed.drop_old_records(registration bigint, records jsonb) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    kind text;
begin
    delete from autoembed.run u
    where u.registration = drop_old_records.registration and u.finished < clock_timestamp() - '1 day'::interval;
    foreach kind in array array['failure', 'truncation'] loop
        continue when jsonb_typeof(records -> kind) = 'null';
        execute format(
            'with record as materialized (
                 select u.key, jsonb_hash_extended(u.key, 0) as key_hash, u.there from jsonb_to_recordset($2) as u (key jsonb, there boolean)
             ), gone as (
                 delete from autoembed.%1$I f using record u
                 where f.registration = $1 and f.key_hash = u.key_hash and f.key = u.key and not u.there
             )
             update autoembed.%1$I f set checked = clock_timestamp() from record u
             where f.registration = $1 and f.key_hash = u.key_hash and f.key = u.key and u.there', kind)
        using registration, records -> kind;
    end loop;
end
$$;
