-- The partial index that holds the pending rows in key order.

-- A name that no relation has, and none of those that are about to be made either.
create function autoembed.free_index_name(relation oid, target name, purpose text, taken text[] default '{}')
    returns name
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
    home name;
    stem text;
    candidate name;
    n integer := 1;
begin
    select s.nspname, autoembed.cut(c.relname, 29) || '_' || autoembed.cut(target, 20) || '_' || purpose into home, stem
    from pg_class c join pg_namespace s on s.oid = c.relnamespace where c.oid = relation;
    candidate := stem;
    while to_regclass(format('%I.%I', home, candidate)) is not null
        or format('%I.%I', home, candidate) = any (taken) loop
        n := n + 1;
        candidate := stem || n;
    end loop;
    return candidate;
end
$$;

-- The pending rows in key order. least() of one column is that column; it is there so that an order by it can be served
-- by this index alone: with old statistics the planner would walk the primary key past all rows that are filled.
create function autoembed.install_pending_index(registration bigint) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    s autoembed.column_sql := autoembed.column_sql_of(registration);
    target name := autoembed.target_name(registration);
    place name := (select n.nspname from pg_class c join pg_namespace n on n.oid = c.relnamespace
        where c.oid = s.relation);
    index name;
begin
    if autoembed.has_pending_index(s.relation, s.target_number) then
        return;
    end if;
    perform autoembed.drop_pending_index(s.relation, s.target_number);  -- of a former key
    index := autoembed.free_index_name(s.relation, target, 'pending');
    execute format('create index %I on %s (%s) where %s', index, s.name,
                   (select string_agg(format(case k.n when 1 then '(least(%I))' else '%I' end, u), ', ' order by k.n)
                    from unnest(s.key_names) with ordinality as k (u, n)),
                   autoembed.pending_condition('', target, s.sources));
    execute format('alter index %I.%I depends on extension pg_autoembed', place, index);
end
$$;

create function autoembed.pending_indexes(relation oid, target smallint) returns setof oid
language sql stable
begin atomic
    select i.indexrelid
    from pg_catalog.pg_index i
    join pg_catalog.pg_depend x on x.classid = 'pg_class'::regclass and x.objid = i.indexrelid and x.deptype = 'x'
    join pg_catalog.pg_extension e on e.oid = x.refobjid and e.extname = 'pg_autoembed'
    where i.indrelid = relation and i.indpred is not null
      and exists (select from pg_catalog.pg_depend c
                  where c.classid = 'pg_class'::regclass and c.objid = i.indexrelid
                    and c.refclassid = 'pg_class'::regclass and c.refobjid = relation and c.refobjsubid = target);
end;

create function autoembed.has_pending_index(relation oid, target smallint) returns boolean
language sql stable
begin atomic
    select exists (
        select from autoembed.pending_indexes(relation, target) p
        join pg_catalog.pg_index i on i.indexrelid = p and i.indisvalid
        where pg_get_indexdef(p, 1, false) = (
                select format('LEAST(%I)', c.name) from autoembed.key_columns(relation) c where c.position = 0)
          and (i.indkey::smallint[])[1 : i.indnkeyatts - 1] = (
                select (k.indkey::smallint[])[1 : k.indnkeyatts - 1] from pg_catalog.pg_index k
                    where k.indexrelid = autoembed.key_index(relation)));
end;

-- What a REINDEX CONCURRENTLY that was broken off has left of a pending index (..._ccnew, ..._ccold), on the relation
-- or its partitions: it is never used, is in each write's way, and nothing else tells that it is ours.
create function autoembed.broken_indexes(relation oid, target smallint) returns setof oid
language sql stable
begin atomic
    select i.indexrelid
    from autoembed.family(relation) m
    join pg_catalog.pg_index i on i.indrelid = m and not i.indisvalid and i.indpred is not null
    join pg_catalog.pg_class c on c.oid = i.indexrelid and c.relkind = 'i' and not c.relispartition
    where i.indexrelid not in (select p from autoembed.pending_indexes(relation, target) p)
      and substring(pg_get_indexdef(i.indexrelid) from ' USING .*') in (
          select substring(pg_get_indexdef(p) from ' USING .*') from autoembed.pending_indexes(relation, target) p);
end;

create function autoembed.drop_pending_index(relation oid, target smallint) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    index oid;
begin
    foreach index in array array(
        select * from autoembed.broken_indexes(relation, target)
        union all
        select * from autoembed.pending_indexes(relation, target))
    loop
        execute format('drop index %s', index::regclass);
    end loop;
end
$$;
