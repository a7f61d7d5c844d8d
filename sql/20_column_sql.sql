-- From a registration to the pieces of sql that serve its relation.
--
-- Two kinds of functions: those that read catalogs and state pin search_path or are bound when created (begin atomic).
-- Those that read or write a user's table must pin neither it nor any other setting: the table's own triggers and
-- policies run inside them and expect the session's. So the pieces built here name every function, operator and type
-- with its schema; and what the planner must be told is set while it plans, and no longer (open_scan, open_lookup).

create type autoembed.column_sql as (
    registration bigint,
    generation bigint,
    relation oid,
    name text,              -- schema-qualified and quoted
    rows text,              -- the same for FROM and UPDATE: of a plain table its own rows only, no later child's
    label text,             -- for messages: relation.target
    target text,            -- quoted
    type text,              -- of the target, schema-qualified
    dimensions integer,
    target_number smallint,
    sources name[],
    model text,
    fingerprint text,
    mode text,
    enabled boolean,
    content text,           -- expression over t: the text to embed
    pending text,           -- condition over t: what the partial index holds
    key_names name[],
    key text,               -- expression over t: the row's key, a jsonb array
    ordering text,          -- the partial index's order over t
    matching text,          -- condition: row t is the one with key d.key
    beyond text             -- condition: row t comes after the key $1
);

-- Text that is longer than this is taken as not blank by the partial index, so that an UPDATE of another column
-- never has to fetch a long text from toast, and COPY looks into short ones alone. What is really blank is found when
-- the row is claimed.
create function autoembed.not_blank(expression text) returns text
language sql immutable
begin atomic
    select format(
        '(pg_catalog.octet_length(%1$s) operator(pg_catalog.>) 32 or %1$s operator(pg_catalog.~) ''[^[:space:]]'')',
        format('(%s)::pg_catalog.text collate pg_catalog."C"', expression));
end;

-- as many whole characters as fit
create function autoembed.cut(name text, bytes integer) returns text
language sql immutable
begin atomic
    select left(name, (select coalesce(max(n), 0) from generate_series(1, length(name)) n
        where octet_length(left(name, n)) <= bytes));
end;

create function autoembed.pending_condition(prefix text, target name, sources name[]) returns text
language sql immutable
begin atomic
    select format('%s%I is null and (%s)', prefix, target,
        (select string_agg(autoembed.not_blank(prefix || quote_ident(s)), ' or ' order by n)
         from unnest(sources) with ordinality as u (s, n)));
end;

create function autoembed.hash(content text) returns bytea
language sql stable
begin atomic
    select pg_catalog.sha256(convert_to(content, 'UTF8'));
end;

-- Only types that are text under another name: a cast that runs a user's function would run it with the filler's
-- rights.
create function autoembed.is_text(type oid) returns boolean
language sql stable
begin atomic
    with recursive base (oid) as (
        select type
        union all
        select t.typbasetype from base join pg_catalog.pg_type t on t.oid = base.oid where t.typtype = 'd'
    )
    select exists (
        select from base
        where base.oid in ('text'::regtype, 'varchar'::regtype, 'bpchar'::regtype)
           or exists (select from pg_catalog.pg_cast c
                      where c.castsource = base.oid and c.casttarget = 'text'::regtype and c.castmethod = 'b'));
end;

-- the type beneath a domain, or the type itself
create function autoembed.base_type(type oid) returns oid
language sql stable
begin atomic
    with recursive base (oid, domain_of) as (
        select t.oid, t.typbasetype from pg_catalog.pg_type t where t.oid = type
        union all
        select t.oid, t.typbasetype from base join pg_catalog.pg_type t on t.oid = base.domain_of
    )
    select b.oid from base b where b.domain_of = 0;
end;

-- Its values must come back from jsonb's ->> as they went in, and must run no code of their own on the way.
create function autoembed.is_scalar(type oid) returns boolean
language sql stable
begin atomic
    with recursive base (oid) as (
        select type
        union all
        select t.typbasetype from base join pg_catalog.pg_type t on t.oid = base.oid where t.typtype = 'd'
    )
    select not exists (
        select from base join pg_catalog.pg_type t on t.oid = base.oid
        where t.typcategory = 'A' or t.typtype in ('c', 'p') or t.oid in ('json'::regtype, 'jsonb'::regtype));
end;

create function autoembed.is_vector(type oid) returns boolean
language sql stable
begin atomic
    select exists (
        select from pg_catalog.pg_type t
        join pg_catalog.pg_depend d on d.classid = 'pg_type'::regclass and d.objid = t.oid and d.deptype = 'e'
        join pg_catalog.pg_extension e on e.oid = d.refobjid and e.extname = 'vector'
        where t.oid = type and t.typname = 'vector');
end;

-- the primary key, or the smallest unique key without nulls, expressions, a predicate, or another order than its
-- types' own: rows are claimed in that order, and a cursor of another would skip some
create function autoembed.key_index(relation oid) returns oid
language sql stable
begin atomic
    select i.indexrelid
    from pg_catalog.pg_index i
    join pg_catalog.pg_class c on c.oid = i.indexrelid
    join pg_catalog.pg_am m on m.oid = c.relam and m.amname = 'btree'
    where i.indrelid = relation and i.indisunique and i.indisvalid and i.indimmediate
      and i.indpred is null and i.indexprs is null
      and not exists (
          select from pg_catalog.pg_attribute a
          where a.attrelid = relation and not a.attnotnull
            and a.attnum = any ((i.indkey::smallint[])[0 : i.indnkeyatts - 1]))
      and not exists (
          select from pg_catalog.pg_opclass o
          where o.oid = any ((i.indclass::oid[])[0 : i.indnkeyatts - 1]) and not o.opcdefault)
    order by i.indisprimary desc, i.indnkeyatts, i.indexrelid
    limit 1;
end;

-- For all that needs to tell rows apart. Where the key is gone the caller could make no SQL for the relation.
create function autoembed.check_key(relation oid) returns void
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
    if autoembed.key_index(relation) is null then
        raise exception using errcode = 'object_not_in_prerequisite_state',
            message = format('relation %s has lost its primary key: its rows cannot be told apart', relation::regclass),
            hint = 'Add a primary key, or a unique key without nulls, then call embed_column(..., if_not_exists => true).';
    end if;
end
$$;

-- the operator that a btree family uses for equality (3) or greater than (5), safe under any search_path
create function autoembed.operator_of(family oid, type oid, strategy integer) returns text
language sql stable
begin atomic
    select format('operator(%s.%s)', o.oprnamespace::pg_catalog.regnamespace, o.oprname)
    from pg_catalog.pg_amop m
    join pg_catalog.pg_operator o on o.oid = m.amopopr
    where m.amopfamily = family and m.amoplefttype = type and m.amoprighttype = type and m.amopstrategy = strategy;
end;

-- with its schema, for statements under the session's search_path
create function autoembed.type_name(type oid) returns text
language sql stable
begin atomic
    select format('%s.%I', t.typnamespace::pg_catalog.regnamespace, t.typname) from pg_catalog.pg_type t
        where t.oid = type;
end;

-- A value of a key as jsonb that is the same in every session: a row's lock and its failures are known by it. Only
-- types whose text follows a setting pay for it.
create function autoembed.to_fixed_jsonb(value anyelement) returns jsonb
language plpgsql stable set timezone = 'UTC' set intervalstyle = 'postgres' set bytea_output = 'hex'
    set extra_float_digits = 1 as $$
begin
    return pg_catalog.to_jsonb(value);
end
$$;

create function autoembed.follows_settings(type oid) returns boolean
language sql stable
begin atomic
    select t.typtype <> 'e' and t.oid <> all (array[
        'bigint', 'integer', 'smallint', 'oid', 'numeric', 'boolean', 'uuid', 'date', 'timestamp', 'time',
        'text', 'varchar', 'bpchar', 'name']::regtype[])
    from pg_catalog.pg_type t where t.oid = autoembed.base_type(type);
end;

create function autoembed.key_columns(
    relation oid, out "position" bigint, out name name, out type text, out equals text, out greater text,
        out scalar boolean,
    out as_json text)
returns setof record
language sql stable
begin atomic
    select k.n - 1, a.attname, autoembed.type_name(a.atttypid),
           autoembed.operator_of(opc.opcfamily, opc.opcintype, 3),
               autoembed.operator_of(opc.opcfamily, opc.opcintype, 5),
           autoembed.is_scalar(a.atttypid),
           format(case when autoembed.follows_settings(a.atttypid) then 'autoembed.to_fixed_jsonb(t.%I)'
               else 't.%I' end, a.attname)
    from pg_catalog.pg_index i
    cross join lateral unnest((i.indkey::smallint[])[0 : i.indnkeyatts - 1], (i.indclass::oid[])[0 : i.indnkeyatts - 1])
        with ordinality as k (attnum, class, n)
    join pg_catalog.pg_attribute a on a.attrelid = relation and a.attnum = k.attnum
    join pg_catalog.pg_opclass opc on opc.oid = k.class
    where i.indexrelid = autoembed.key_index(relation)
    order by k.n;
end;

create function autoembed.column_name(relation oid, attnum smallint) returns name
language sql stable
begin atomic
    select a.attname from pg_catalog.pg_attribute a
    where a.attrelid = relation and a.attnum = column_name.attnum and not a.attisdropped;
end;

create function autoembed.column_names(relation oid, columns smallint[]) returns name[]
language sql stable
begin atomic
    select array_agg(a.attname order by u.n)
    from unnest(columns) with ordinality as u (attnum, n)
    join pg_catalog.pg_attribute a on a.attrelid = relation and a.attnum = u.attnum and not a.attisdropped;
end;

-- The relation, a table or an index, and where it is partitioned all that is under it. pg_partition_tree locks them,
-- before the one above: it waits for whoever holds one, and who holds one and wants the table waits for it. This takes
-- no lock.
create function autoembed.family(relation oid) returns setof oid
language sql stable
begin atomic
    with recursive member (oid) as (
        select relation
        union all
        select c.oid
        from member m
        join pg_catalog.pg_inherits i on i.inhparent = m.oid
        join pg_catalog.pg_class c on c.oid = i.inhrelid and c.relispartition
    )
    select m.oid from member m;
end;

-- May sql over this relation be made from the registration? An owner can write its registrations by hand, and a
-- superuser's look at embedding_progress runs what they say: so no column whose type or table runs code of its own.
create function autoembed.is_sound(r autoembed.registration) returns boolean
language sql stable
begin atomic
    select exists (
        select from pg_catalog.pg_class c
        join pg_catalog.pg_attribute a on a.attrelid = c.oid and a.attnum = (r).target and not a.attisdropped
        where c.oid = (r).relation and c.relkind in ('r', 'p') and c.relpersistence <> 't'
            and autoembed.is_vector(a.atttypid))
      and (select count(*) = cardinality((r).sources) and coalesce(bool_and(autoembed.is_text(a.atttypid)), false)
           from pg_catalog.pg_attribute a
           where a.attrelid = (r).relation and a.attnum = any ((r).sources) and a.attnum > 0 and not a.attisdropped)
      and not exists (select from pg_catalog.pg_class t, autoembed.family(t.oid) m, pg_catalog.pg_class c
                      where t.oid = (r).relation and t.relkind = 'p' and c.oid = m and c.relkind = 'f');
end;

-- null where the registration, its relation, a column or the key is gone
create function autoembed.column_sql_of(registration bigint) returns autoembed.column_sql
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
    r autoembed.registration;
    s autoembed.column_sql;
    k record;
begin
    select * into r from autoembed.registration g where g.id = column_sql_of.registration;
    if r.id is null or not autoembed.is_sound(r) then
        return null;
    end if;
    select format('%I.%I', n.nspname, c.relname), format('%s%I.%I', case c.relkind when 'r' then 'only ' end, n.nspname,
        c.relname),
           format('%I', a.attname), autoembed.type_name(a.atttypid), a.atttypmod,
           autoembed.column_names(r.relation, r.sources), format('%s.%I', c.oid::regclass, a.attname)
    into s.name, s.rows, s.target, s.type, s.dimensions, s.sources, s.label
    from pg_class c
    join pg_namespace n on n.oid = c.relnamespace
    join pg_attribute a on a.attrelid = c.oid and a.attnum = r.target and not a.attisdropped
    where c.oid = r.relation;

    select array_agg(c.name order by c.position) as names,
           string_agg(format(case c.position when 0 then 'least(t.%I)' else 't.%I' end, c.name), ', '
               order by c.position) as indexed,
           format('pg_catalog.jsonb_build_array(%s)', string_agg(c.as_json, ', ' order by c.position)) as key,
           string_agg(format('t.%I %s (d.key operator(pg_catalog.->>) %s)::%s', c.name, c.equals, c.position, c.type),
               ' and ' order by c.position) as matching,
           string_agg(format('($1 operator(pg_catalog.->>) %s)::%s', c.position, c.type), ', '
               order by c.position) as bounds,
           min(c.greater) as greater
    into k
    from autoembed.key_columns(r.relation) c;

    if k.names is null then
        return null;
    end if;
    s.registration := r.id;
    s.generation := r.generation;
    s.relation := r.relation;
    s.model := r.model;
    s.fingerprint := r.fingerprint;
    s.mode := r.mode;
    s.enabled := r.enabled;
    s.target_number := r.target;
    s.content := case when r.options ? 'template' then autoembed.template_content(r.options ->> 'template', s.sources)
        when cardinality(s.sources) = 1 then format('(t.%I)::pg_catalog.text', s.sources[1])
        else format('pg_catalog.array_to_string(array[%s], E''\n'')',
            (select string_agg(format('(t.%I)::pg_catalog.text', u.name), ', ' order by u.n)
                                               from unnest(s.sources) with ordinality as u (name, n))) end;
    s.pending := autoembed.pending_condition('t.', autoembed.column_name(r.relation, r.target), s.sources);
    s.key_names := k.names;
    s.key := k.key;
    s.ordering := k.indexed;
    s.matching := k.matching;
    s.beyond := case cardinality(k.names)
        when 1 then format('%s %s %s', k.indexed, k.greater, k.bounds)
        else format('row(%s) operator(pg_catalog.>) row(%s)', k.indexed, k.bounds) end;
    return s;
end
$$;

-- key array -> object with the columns' names of today, for people
create function autoembed.key_object(relation oid, key jsonb) returns jsonb
language sql stable
begin atomic
    select jsonb_object_agg(c.name, key -> c.position::integer) from autoembed.key_columns(relation) c;
end;

create function autoembed.counted(number bigint, one text, several text) returns text
language sql immutable
begin atomic
    select format('%s %s', number, case number when 1 then one else several end);
end;

create function autoembed.find(relation regclass, target name) returns bigint
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
    found_id bigint;
begin
    select r.id into found_id
    from autoembed.registration r
    join pg_attribute a on a.attrelid = r.relation and a.attnum = r.target and not a.attisdropped
    where r.relation = find.relation and a.attname = find.target;
    if found_id is null then
        raise exception using errcode = 'undefined_object',
            message = format('column %I of relation %s is not declared for embedding', target, relation),
            hint = coalesce(
                'Declared there: ' || (
                    select string_agg(quote_ident(a.attname), ', ' order by a.attname)
                    from autoembed.registration r
                    join pg_attribute a on a.attrelid = r.relation and a.attnum = r.target and not a.attisdropped
                    where r.relation = find.relation) || '. Name it with target => ....',
                'Declare it with embed_column(relation, source, target); the view embedding_columns lists what is declared.');
    end if;
    return found_id;
end
$$;

create function autoembed.rows_of(relation oid) returns text
language sql stable
begin atomic
    select format('%s%I.%I', case c.relkind when 'r' then 'only ' end, n.nspname, c.relname)
    from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace where c.oid = relation;
end;

create function autoembed.has_text(content text) returns text
language sql immutable
begin atomic
    select format('%s collate pg_catalog."C" operator(pg_catalog.~) ''[^[:space:]]''', content);
end;

-- A statement over a user's table is planned as a cursor is opened here, and runs as its one row is fetched, under the
-- caller's settings: those that stand here would reach the table's own triggers and policies. The planner is bound to
-- an index in the order that is asked for: with old statistics it would sort, or walk another one. jit is off because
-- what is switched off counts as very expensive, and jit would compile for seconds to run in microseconds.
create function autoembed.open_scan(query text, after jsonb, wanted bigint, beyond text default null) returns refcursor
language plpgsql volatile set enable_seqscan = off set enable_sort = off set enable_bitmapscan = off set jit = off as $$
declare
    planned pg_catalog.refcursor;
begin
    open planned for execute query using after, wanted, beyond;
    return planned;
end
$$;

-- The same for rows that are named by their keys.
create function autoembed.open_lookup(query text, keys jsonb[], hashes bytea[] default null,
    vectors text[] default null)
returns refcursor
language plpgsql volatile set enable_seqscan = off set jit = off as $$
declare
    planned pg_catalog.refcursor;
begin
    open planned for execute query using keys, hashes, vectors;
    return planned;
end
$$;
