-- What else one asks of vectors: many queries at once, rows like a row, rows that say the same, a look at one vector.

create function embed_search(
    relation regclass, queries text[], k integer default 10, target name default 'embedding', filter jsonb default null,
    out query text, out key jsonb, out distance double precision, out content text)
returns setof record
language plpgsql stable parallel unsafe rows 100 as $$
declare
    s autoembed.column_sql := autoembed.column_sql_of(autoembed.find(relation, target));
    question record;
begin
    perform autoembed.check_search(relation, s, k);
    if queries is null or pg_catalog.array_position(queries, null) is not null then
        raise exception using errcode = 'null_value_not_allowed', message = 'a query is null';
    end if;
    for question in
        select q.content, q.vector
        from rows from (pg_catalog.unnest(queries), pg_catalog.unnest(@extschema@.embed(queries, s.model, 'query')))
            as q (content, vector)
    loop
        query := question.content;
        return query select question.content, f.key, f.distance, f.content
                     from autoembed.search_nearest(s, question.vector::pg_catalog.text, k, filter) f;
    end loop;
end
$$;

comment on function embed_search(regclass, text[], integer, name, jsonb) is
    'Returns for each of the queries the k rows nearest to it, the nearest first. The queries are encoded in one '
    'pass.';

-- The vector of the row with this key, an object of all key columns; and the key as searches return it.
create function autoembed.vector_of(s autoembed.column_sql, wanted jsonb, out vector text, out own_key jsonb)
language plpgsql stable as $$
declare
    key pg_catalog.jsonb := (
        select pg_catalog.jsonb_agg(wanted operator(pg_catalog.->) u.name::pg_catalog.text order by u.n)
        from pg_catalog.unnest(s.key_names) with ordinality as u (name, n));
    names pg_catalog.text[] := array(
        select o.k from pg_catalog.jsonb_object_keys(
            case pg_catalog.jsonb_typeof(wanted) when 'object' then wanted else '{}' end) as o (k) order by 1);
begin
    if names operator(pg_catalog.<>) array(
            select u.name::pg_catalog.text from pg_catalog.unnest(s.key_names) as u (name) order by 1) then
        raise exception using errcode = 'invalid_parameter_value',
            message = pg_catalog.format('a key of %s is an object of its key columns', s.label),
            hint = pg_catalog.format('Its key columns: %s.', pg_catalog.array_to_string(s.key_names, ', '));
    end if;
    execute pg_catalog.format(
        'select (t.%s)::pg_catalog.text, %s from (select $1 as key) d join %s t on %s',
        s.target, autoembed.key_expression(s), s.rows, s.matching)
    into vector, own_key using key;
    if own_key is null then
        raise exception using errcode = 'no_data_found',
            message = pg_catalog.format('%s has no row with this key', s.label);
    elsif vector is null then
        raise exception using errcode = 'object_not_in_prerequisite_state',
            message = pg_catalog.format('the row of %s with this key has no vector yet', s.label),
            hint = 'Fill it with call embed_pending(); embedding_failures says whether the row has failed.';
    end if;
end
$$;

create function embed_similar(
    relation regclass, to_key jsonb, k integer default 10, target name default 'embedding', filter jsonb default null,
    out key jsonb, out distance double precision, out content text)
returns setof record
language plpgsql stable parallel unsafe rows 10 as $$
declare
    s autoembed.column_sql := autoembed.column_sql_of(autoembed.find(relation, target));
begin
    perform autoembed.check_search(relation, s, k);
    if to_key is null then
        raise exception using errcode = 'null_value_not_allowed', message = 'the key is null';
    end if;
    return query
        select f.key, f.distance, f.content
        from autoembed.vector_of(s, to_key) v,
             autoembed.search_nearest(s, v.vector, k operator(pg_catalog.+) 1, filter) f
        where f.key operator(pg_catalog.<>) v.own_key
        order by f.distance
        limit k;
end
$$;

comment on function embed_similar(regclass, jsonb, integer, name, jsonb) is
    'Returns the k rows nearest to the row with this key ({"column": value, ...}), the nearest first, without that '
    'row.';

create function embed_duplicates(
    relation regclass, within double precision default 0.02, target name default 'embedding',
    out key jsonb, out duplicate jsonb, out distance double precision)
returns setof record
language plpgsql stable parallel unsafe rows 100 as $$
declare
    s autoembed.column_sql := autoembed.column_sql_of(autoembed.find(relation, target));
    former pg_catalog.jsonb;
begin
    perform autoembed.check_key(relation);
    if (within between 0 and 2) is not true then
        raise exception using errcode = 'invalid_parameter_value',
            message = pg_catalog.format('within is %s', coalesce(within::pg_catalog.text, 'null')),
            hint = 'within is a cosine distance, from 0 to 2.';
    end if;
    execute pg_catalog.format('select %L::%s', '[1]', s.type);  -- pgvector's settings are there once it is loaded
    if not exists (select from autoembed.vector_indexes(s.relation, s.target_number))
        and autoembed.known_rows(s.relation) operator(pg_catalog.>) 10000 then
        raise notice using
            message = pg_catalog.format('%s has no index: each of its vectors is compared with all others', s.label),
            hint = pg_catalog.format('Make one first: select embed_index(%L, %L)', s.name, s.target);
    end if;
    former := autoembed.widen_search(s, 20);
    return query execute autoembed.duplicates_statement(s) using within;
    perform autoembed.narrow_search(former);
end
$$;

comment on function embed_duplicates(regclass, double precision, name) is
    'Returns the pairs of rows whose vectors are at most this cosine distance apart. It looks at each row''s 20 '
    'nearest, by the index.';

-- Each pair once, whichever of the two finds the other; of two keys the lesser comes first.
create function autoembed.duplicates_statement(s autoembed.column_sql) returns text
language sql stable
begin atomic
    select format(
        'select distinct least(a.key, b.key), greatest(a.key, b.key), b.distance
         from (select %1$s as key, t.%2$s as vector from %3$s t where t.%2$s is not null) a
         cross join lateral (
             select %1$s as key, t.%2$s operator(%4$s.<=>) a.vector as distance
             from %3$s t where t.%2$s is not null
             order by t.%2$s operator(%4$s.<=>) a.vector limit 20) b
         where b.distance operator(pg_catalog.<=) $1 and a.key operator(pg_catalog.<>) b.key',
        autoembed.key_expression(s), s.target, s.rows,
        (select e.extnamespace::regnamespace from pg_catalog.pg_extension e where e.extname = 'vector'));
end;
