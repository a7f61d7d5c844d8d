-- Where the next call begins.

-- Where a call begins. No row: with the first one, for no long stretch lies before the rows that are worth a look.
create function autoembed.frontier(s autoembed.column_sql, out key jsonb, out held boolean)
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
    from autoembed.family(relation) t (oid);
end;

-- For the next call's beginning, a call says behind which key no row was held back, and where the last row was that it
-- saw. A caller who may not write state leaves it as it is, as does one whose column was dropped meanwhile.
create function autoembed.set_frontier(s autoembed.column_sql, key jsonb, last jsonb) returns void
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
    perform autoembed.request(s.registration, 'set frontier',
        jsonb_build_object('key', key, 'beyond', s.beyond, 'held', held));
end
$$;

create function autoembed.write_frontier(registration bigint, frontier jsonb) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
    if jsonb_typeof(frontier -> 'key') = 'null' then
        delete from autoembed.frontier f where f.registration = write_frontier.registration;
    else
        insert into autoembed.frontier as f values (registration, frontier -> 'key', frontier ->> 'beyond',
            (frontier ->> 'held')::boolean)
        on conflict on constraint frontier_pkey do update set key = excluded.key, beyond = excluded.beyond,
            held = excluded.held
        where (f.key, f.beyond, f.held) is distinct from (excluded.key, excluded.beyond, excluded.held);
    end if;
end
$$;
