-- The index, and the search that uses it.

-- The column's index for the cosine distance, whether it is usable yet or not.
create function autoembed.cosine_index(relation oid, target name, out index oid, out valid boolean)
returns setof record
language sql stable
begin atomic
    select i.indexrelid, i.indisvalid
    from pg_catalog.pg_index i
    join pg_catalog.pg_class c on c.oid = i.indexrelid
    join pg_catalog.pg_am a on a.oid = c.relam and a.amname = 'hnsw'
    join pg_catalog.pg_opclass o on o.oid = i.indclass[0] and o.opcname = 'vector_cosine_ops'
    join pg_catalog.pg_attribute t on t.attrelid = i.indrelid and t.attnum = i.indkey[0] and t.attname = target
    where i.indrelid = relation and i.indpred is null
    order by i.indisvalid desc, i.indexrelid
    limit 1;
end;

-- Of a partitioned table, its partitions and theirs: the index that is there, or the name of one to be made.
create function autoembed.index_tree(
    relation regclass, target name, out level integer, out partition regclass, out parent regclass, out is_leaf boolean,
    out index oid, out valid boolean, out name name, out label text)
returns setof record
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
    taken text[] := '{}';
    place name;
begin
    for level, partition, parent, is_leaf, index, valid, name, place in
        select t.level, t.relid, t.parentrelid, t.isleaf, x.index, coalesce(x.valid, false), i.relname, n.nspname
        from pg_partition_tree(relation) t
        join pg_class c on c.oid = t.relid
        join pg_namespace n on n.oid = c.relnamespace
        left join lateral autoembed.cosine_index(t.relid, target) x on true
        left join pg_class i on i.oid = x.index
        order by t.level, t.relid
    loop
        name := coalesce(name, autoembed.free_index_name(partition, target, 'hnsw', taken));
        label := format('%I.%I', place, name);
        taken := taken || label;
        return next;
    end loop;
end
$$;

-- A build that was broken off leaves an index that is never used, and is in each write's way: it is built anew.
create function autoembed.index_statement(relation regclass, index regclass, name name, manner text, definition text)
returns text
language sql stable
begin atomic
    select case when index is null then format('create index %s%I on %s %s', manner, name, relation, definition)
                else format('reindex index %s%s', manner, index) end;
end;

-- PostgreSQL builds no index of a partitioned table concurrently. So the parents' indexes are made empty, then those of
-- the partitions, and each is attached to its parent's, the lowest first. What is there already is taken as it is: the
-- statements can be asked for again where some of them were not run, or one failed.
create function autoembed.partition_index_statements(relation regclass, target name, manner text, definition text)
returns setof text
language sql stable
begin atomic
    with tree as materialized (
        select * from autoembed.index_tree(relation, target)
    ), steps (step, level, label, statement) as (
        select 1, t.level, t.label, format('create index %I on only %s %s', t.name, t.partition, definition)
        from tree t where not t.is_leaf and t.index is null
        union all
        select 2, t.level, t.label, autoembed.index_statement(t.partition, t.index, t.name, manner, definition)
        from tree t where t.is_leaf and not t.valid
        union all
        select 3, -t.level, t.label, format('alter index %s attach partition %s', p.label, t.label)
        from tree t join tree p on p.partition = t.parent
        where not exists (select from pg_catalog.pg_inherits i where i.inhrelid = t.index and i.inhparent = p.index)
    )
    select s.statement from steps s order by s.step, s.level, s.label;
end;

-- none where a usable index is there
create function autoembed.index_statements(relation regclass, target name, manner text, definition text)
returns setof text
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
    partitioned boolean := (select c.relkind = 'p' from pg_class c where c.oid = relation);
    existing record;
begin
    select * into existing from autoembed.cosine_index(relation, target);
    if existing.valid then
        return;
    elsif partitioned and (manner <> '' or existing.index is not null) then
        return query select * from autoembed.partition_index_statements(relation, target, manner, definition);
    else
        return next autoembed.index_statement(
            relation, existing.index, autoembed.free_index_name(relation, target, 'hnsw'), manner, definition);
    end if;
end
$$;

create function embed_index(
    relation regclass, target name default 'embedding', m integer default 16, ef_construction integer default 64,
    concurrent boolean default false)
returns setof text
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    s autoembed.column_sql := autoembed.column_sql_of(autoembed.find(relation, target));
    manner text := case when concurrent then 'concurrently ' else '' end;
    definition text;
    statement text;
begin
    if (m between 2 and 100 and ef_construction between greatest(4, 2 * m) and 1000) is not true then
        raise exception using errcode = 'invalid_parameter_value',
            message = format('m = %s with ef_construction = %s is not possible', m, ef_construction),
            hint = 'm is 2 to 100; ef_construction is at least 2 * m and at most 1000.';
    end if;
    perform autoembed.check_key(relation);
    definition := format(
        'using hnsw (%s %s.vector_cosine_ops) with (m = %s, ef_construction = %s)', s.target,
        (select e.extnamespace::regnamespace from pg_extension e where e.extname = 'vector'), m, ef_construction);
    for statement in select * from autoembed.index_statements(relation, target, manner, definition) loop
        if manner = '' then
            execute statement;
        end if;
        return next statement;
    end loop;
    if statement is null then
        raise notice using message = format('%s is there already, nothing changed',
                                            (select x.index::regclass from autoembed.cosine_index(relation, target) x));
    end if;
end
$$;

comment on function embed_index(regclass, name, integer, integer, boolean) is
    'Makes the HNSW index (cosine). With concurrent => true it only returns the statements, to be run outside a '
    'transaction.';

-- How a column, or an array column's elements, are compared with a value of the filter: both brought to the type that
-- the column's own btree order works on, by that order's equality: found by name, the operator could be anybody's.
-- No equality: a filter does not compare such columns. Text search has another, and a vector is no condition.
create function autoembed.filter_equality(type oid, out cast_to text, out equals text, out is_array boolean)
language sql stable
begin atomic
    with recursive base (oid, is_array) as (
        select type, false
        union all
        select case t.typtype when 'd' then t.typbasetype else t.typelem end, base.is_array or t.typtype <> 'd'
        from base join pg_catalog.pg_type t on t.oid = base.oid
        where t.typtype = 'd' or t.typcategory = 'A' and t.typelem <> 0
    ), plain as (
        select case when autoembed.is_text(base.oid) then 'text'::regtype::oid else base.oid end as oid,
               t.typtype, base.is_array
        from base join pg_catalog.pg_type t on t.oid = base.oid
        where t.typtype <> 'd' and t.typcategory <> 'A'
    )
    select autoembed.type_name(p.oid),
           (select autoembed.operator_of(o.opcfamily, o.opcintype, 3)
            from pg_catalog.pg_opclass o
            join pg_catalog.pg_am m on m.oid = o.opcmethod and m.amname = 'btree'
            where o.opcdefault and o.opcintype = case p.typtype when 'e' then 'anyenum'::regtype else p.oid end
              and p.oid not in ('jsonb'::regtype, 'tsvector'::regtype, 'tsquery'::regtype)
              and not autoembed.is_vector(p.oid)),
           p.is_array
    from plain p;
end;

-- one value, or an array of such
create function autoembed.is_plain(value jsonb) returns boolean
language sql immutable
begin atomic
    select not exists (
        select from jsonb_array_elements('[]' || value) v where jsonb_typeof(v) in ('array', 'object'));
end;

create function autoembed.refuse_filter(relation oid, a pg_attribute, value jsonb) returns void
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
    raise exception using errcode = 'invalid_parameter_value',
        message = format('the filter cannot compare column %I of %s, of type %s, with a JSON %s',
                         a.attname, relation::regclass, format_type(a.atttypid, a.atttypmod), jsonb_typeof(value)),
        hint = 'A filter compares columns of text, numbers, booleans, times, uuids and enums, and arrays of these, with '
               'a string, a number, a boolean or an array of such; a jsonb column with anything. For other conditions '
               'write the query yourself, with order by embedding <=> (select embed(...)).';
end
$$;

-- A condition from "column": value. Equality; null is null; an array is any of its elements; an array column contains
-- any of them; a jsonb column contains the value.
create function autoembed.filter_term(relation oid, name text, value jsonb) returns text
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
    a pg_attribute;
    cast_to text;
    equals text;
    is_array boolean;
    elements text;
begin
    select * into a from pg_attribute x
    where x.attrelid = relation and x.attname = name and x.attnum > 0 and not x.attisdropped;
    select * into cast_to, equals, is_array from autoembed.filter_equality(a.atttypid);
    if a.attnum is null then
        raise exception using errcode = 'undefined_column',
            message = format('the filter names column %I, which relation %s does not have', name, relation::regclass);
    elsif value = 'null' then
        return format('t.%I is null', name);
    elsif a.atttypid = 'jsonb'::regtype then
        return format('t.%I operator(pg_catalog.@>) ($3 operator(pg_catalog.->) %L)', name, name);
    elsif equals is null or not autoembed.is_plain(value) then
        perform autoembed.refuse_filter(relation, a, value);
    end if;
    elements := format('array(select (v.v)::%s from pg_catalog.jsonb_array_elements_text(
                            pg_catalog.jsonb_build_array() operator(pg_catalog.||) ($3 operator(pg_catalog.->) %L)) v (v))',
                       cast_to, name);
    return case when is_array then format('(t.%I)::%s[] operator(pg_catalog.&&) %s', name, cast_to, elements)
                else format('(t.%I)::%s %s any (%s)', name, cast_to, equals, elements) end;
end
$$;

create function autoembed.filter_condition(relation oid, filter jsonb) returns text
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
    if jsonb_typeof(filter) <> 'object' then
        raise exception using errcode = 'invalid_parameter_value', message = 'the filter is not a JSON object',
            hint = 'Write it as {"column": value, ...}.';
    end if;
    return coalesce((select string_agg(autoembed.filter_term(relation, f.key, f.value), ' and ')
                     from jsonb_each(filter) f), 'true');
end
$$;

-- The second search is a branch of the same plan that runs only where the first one came short. No index serves the
-- order by a sum.
create function autoembed.search_surely(query text, nearest text) returns text
language sql immutable
begin atomic
    select format(
        'with quick as materialized (%1$s order by %2$s limit $2),
         sure as (%1$s and (select pg_catalog.count(*) from quick) operator(pg_catalog.<) $2
                  order by (%2$s) operator(pg_catalog.+) 0::pg_catalog.float8 limit $2)
         select q.* from quick q where (select pg_catalog.count(*) from quick) operator(pg_catalog.=) $2
         union all select s.* from sure s
         order by distance', query, nearest);
end;

-- The row's key as an object of its columns, as searches return it.
create function autoembed.key_expression(s autoembed.column_sql) returns text
language sql immutable
begin atomic
    select format('pg_catalog.jsonb_build_object(%s)', string_agg(format('%L, t.%1$I', u.name), ', ' order by u.n))
    from unnest(s.key_names) with ordinality as u (name, n);
end;

-- The k nearest rows. An index scan may miss some of them in silence: rows in lists that it does not probe, or rows
-- that come after all those that a filter takes away, up to pgvector's own limits. `surely` then reads the table as
-- well.
create function autoembed.search_statement(s autoembed.column_sql, filter jsonb, surely boolean) returns text
language sql stable
begin atomic
    select case when surely then autoembed.search_surely(n.query, n.nearest)
                else format('select f.* from (%s order by %s limit $2) f order by f.distance', n.query, n.nearest) end
    from (
        select d.nearest, format(
            'select (%s) as key, %s as distance, %s as content from %s t where t.%s is not null%s',
            autoembed.key_expression(s),
            d.nearest, s.content, s.rows, s.target,
            case when filter <> '{}' then ' and ' || autoembed.filter_condition(s.relation, filter) end) as query
        from format('t.%s operator(%s.<=>) $1::%s', s.target,
                    (select e.extnamespace::regnamespace from pg_catalog.pg_extension e where e.extname = 'vector'),
                    s.type) as d (nearest)) n;
end;

-- pgvector's indexes over the column, on the relation or its partitions; lists: of ivfflat
create function autoembed.vector_indexes(relation oid, target smallint, out method name, out lists integer)
returns setof record
language sql stable
begin atomic
    select m.amname, case m.amname when 'ivfflat'
        then coalesce(substring(c.reloptions::text from 'lists=([0-9]+)')::integer, 100) end
    from autoembed.family(relation) r (oid)
    join pg_catalog.pg_index i on i.indrelid = r.oid and i.indisvalid
    join pg_catalog.pg_class c on c.oid = i.indexrelid
    join pg_catalog.pg_am m on m.oid = c.relam and m.amname in ('hnsw', 'ivfflat')
    where autoembed.column_name(i.indrelid, i.indkey[0]) = autoembed.column_name(relation, target);
end;

-- May a scan of the column's index end with fewer than k rows, although there are as many? An iterative one of hnsw
-- alone goes on until it has them, and a filter, or policies, can be more than it puts up with.
create function autoembed.may_miss(s autoembed.column_sql, filter jsonb) returns boolean
language sql stable
begin atomic
    select exists (
        select from autoembed.vector_indexes(s.relation, s.target_number) i
        where i.method = 'ivfflat' or filter <> '{}' or row_security_active(s.relation)
           or current_setting('hnsw.iterative_scan', true) is null);
end;

-- What lets a scan of pgvector's indexes find k rows and good ones, as far as this version has the setting: as many
-- candidates, the square root of the lists, and more of both while rows are missing. Without jit, which would compile
-- the second search that hardly ever runs.
create function autoembed.search_settings(s autoembed.column_sql, k integer, out name text, out value text)
returns setof record
language sql stable
begin atomic
    select w.name, w.value
    from (select ceil(sqrt(max(x.lists)))::integer as lists
          from autoembed.vector_indexes(s.relation, s.target_number) x) i
    cross join lateral (values
        ('hnsw.ef_search', greatest(current_setting('hnsw.ef_search', true)::integer, least(1000, k + 20))::text),
        ('hnsw.iterative_scan', coalesce(nullif(current_setting('hnsw.iterative_scan', true), 'off'), 'strict_order')),
        ('ivfflat.probes', greatest(current_setting('ivfflat.probes', true)::integer, i.lists)::text),
        ('ivfflat.iterative_scan',
         coalesce(nullif(current_setting('ivfflat.iterative_scan', true), 'off'), 'relaxed_order')),
        ('jit', 'off')) w (name, value)
    where w.value <> current_setting(w.name, true);
end;

-- returns the former values, to be put back
create function autoembed.widen_search(s autoembed.column_sql, k integer) returns jsonb
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    setting record;
    former jsonb := '{}';
begin
    for setting in select * from autoembed.search_settings(s, k) loop
        former := former || jsonb_build_object(setting.name, current_setting(setting.name));
        perform set_config(setting.name, setting.value, true);
    end loop;
    return former;
end
$$;

create function autoembed.narrow_search(former jsonb) returns void
language sql volatile
begin atomic
    select set_config(f.key, f.value, true) from jsonb_each_text(former) f;
end;

-- The model on disk must still be the one that filled the column: distances between two models' vectors mean nothing.
create function autoembed.check_model(s autoembed.column_sql) returns void
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
    if (select m.fingerprint from autoembed.model(s.model) m) <> s.fingerprint then
        raise exception using errcode = 'object_not_in_prerequisite_state',
            message = format('model %s is not the one that %s was filled with', s.model, s.label),
            hint = format('Restore the model''s files, or call embed_column_set(..., model => %L), which clears the column to fill it again.', s.model);
    end if;
end
$$;

create function autoembed.check_search(relation regclass, s autoembed.column_sql, k integer) returns void
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
    if (k between 1 and 1000) is not true then
        raise exception using errcode = 'invalid_parameter_value',
            message = format('k is %s', coalesce(k::text, 'null')), hint = 'k is 1 to 1000.';
    end if;
    perform autoembed.check_key(relation);
    perform autoembed.check_model(s);
end
$$;

create function autoembed.search_nearest(
    s autoembed.column_sql, question text, k integer, filter jsonb,
    out key jsonb, out distance double precision, out content text)
returns setof record
language plpgsql stable parallel unsafe rows 10 as $$
declare
    former pg_catalog.jsonb := autoembed.widen_search(s, k);
begin
    return query execute autoembed.search_statement(s, filter, autoembed.may_miss(s, filter)) using question, k, filter;
    perform autoembed.narrow_search(former);
end
$$;

create function embed_search(
    relation regclass, query text, k integer default 10, target name default 'embedding', filter jsonb default null,
    out key jsonb, out distance double precision, out content text)
returns setof record
language plpgsql stable parallel unsafe rows 10 as $$
declare
    s autoembed.column_sql := autoembed.column_sql_of(autoembed.find(relation, target));
begin
    perform autoembed.check_search(relation, s, k);
    if query is null then
        raise exception using errcode = 'null_value_not_allowed', message = 'the query is null';
    end if;
    return query
        select f.key, f.distance, f.content
        from autoembed.search_nearest(s, @extschema@.embed(query, s.model, 'query')::pg_catalog.text, k, filter) f;
end
$$;

comment on function embed_search(regclass, text, integer, name, jsonb) is
    'Returns the k rows nearest to the query (cosine distance), the nearest first. filter is {"column": value, '
    '...}.';
