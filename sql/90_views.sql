-- What a person looks at. The views run with the reader's rights.

create view embedding_models with (security_invoker = true) as
select m.name, m.status, m.dimensions, m.max_tokens, m.architecture, m.precision, m.fingerprint, m.bytes, m.note
from autoembed.models() m;

create view embedding_settings with (security_invoker = true) as
select s.name, s.value, s.source from autoembed.settings() s;

-- The pending index and the indexes of pgvector, those of partitions among them: what tools that compare a schema with
-- their own idea of it should leave alone.
create function autoembed.indexes_of(relation oid, target smallint) returns regclass[]
language sql stable
begin atomic
    select array_agg(x.index::regclass order by x.place, x.index) from (
        select 1, m from autoembed.pending_indexes(relation, target) p, autoembed.family(p) m
        union all
        select 2, i.indexrelid
        from autoembed.family(relation) m
        join pg_catalog.pg_index i on i.indrelid = m
        join pg_catalog.pg_class c on c.oid = i.indexrelid
        join pg_catalog.pg_am a on a.oid = c.relam and a.amname in ('hnsw', 'ivfflat')
        where autoembed.column_name(m, i.indkey[0]) = autoembed.column_name(relation, target)) x (place, index);
end;

create view embedding_columns with (security_invoker = true) as
select r.relation::regclass as relation, autoembed.column_names(r.relation, r.sources) as source,
       autoembed.column_name(r.relation, r.target) as target, r.model, r.mode, r.enabled,
       a.atttypmod as dimensions, r.fingerprint,
       case when not r.enabled then 'paused'
            when h.hindrance is not null then h.hindrance
            when m.name is null then 'model missing: add it with `autoembed model add`'
            when m.status <> 'ready' then 'model ' || m.status
            when m.fingerprint <> r.fingerprint
                then 'model changed: call embed_column_set with model => ' || quote_literal(r.model)
            when m.dimensions <> a.atttypmod then format('the column has %s dimensions, the model %s', a.atttypmod,
                m.dimensions)
            else 'ready' end as status,
       autoembed.indexes_of(r.relation, r.target) as indexes
from autoembed.registration r
join pg_catalog.pg_attribute a on a.attrelid = r.relation and a.attnum = r.target
cross join lateral (select case when r.enabled then autoembed.hindrance(r) end as hindrance) h
left join autoembed.models() m on m.name = r.model;

-- Why embed_wait's relation is not done, column by column.
create function autoembed.why_left(relation oid) returns text
language sql volatile
begin atomic
    select string_agg(concat_ws(' ', c.target, case
               when c.status = 'paused' then 'is paused (embed_column_set with enabled => true goes on)'
               when c.status <> 'ready' then format('is not filled (%s)', c.status)
               when l.untried then 'has rows that were not tried yet'
               else format(case l.waiting when 1 then 'has %s row that failed and is tried again, in %s s'
                                          else 'has %s rows that failed and are tried again, the next in %s s' end,
                                              l.waiting,
                           greatest(0, round(extract(epoch from l.next_try - clock_timestamp())))) end), '; '
                               order by c.target)
    from autoembed.registration r
    join @extschema@.embedding_columns c on c.relation = r.relation::regclass
        and c.target = autoembed.column_name(r.relation, r.target)
    cross join lateral autoembed.left_over(autoembed.column_sql_of(r.id)) l
    where r.relation = why_left.relation and (l.untried or l.waiting > 0);
end;

-- up to 100,001 entries of the partial index
create function autoembed.indexed_count(s autoembed.column_sql) returns bigint
language plpgsql volatile set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off set jit = off as $$
declare
    found pg_catalog.int8;
begin
    if s.relation is null then
        return null;
    end if;
    execute pg_catalog.format('select pg_catalog.count(*) from (select from %s t where %s order by %s limit 100001) c',
                              s.rows, s.pending, s.ordering) into found;
    return found;
end
$$;

create function autoembed.page_count(relation oid) returns bigint
language sql volatile
begin atomic
    select coalesce(sum(pg_relation_size(l.oid)), 0)::bigint / current_setting('block_size')::bigint
    from autoembed.family(relation) l (oid);  -- a partitioned table has no pages of its own
end;

-- live rows as the statistics have them, or, where they know nothing yet, no more than fit the pages
create function autoembed.row_estimate(relation oid) returns bigint
language sql volatile
begin atomic
    select greatest(coalesce(sum(pg_stat_get_live_tuples(l.oid)), 0),
                    coalesce(sum(c.reltuples), 0),
                    case when autoembed.page_count(relation) > 20000 then 100001 else 0 end)::bigint
    from autoembed.family(relation) l (oid)
    join pg_catalog.pg_class c on c.oid = l.oid and c.relkind <> 'p';  -- which has the sum of its partitions
end;

create function autoembed.count_rows(
    s autoembed.column_sql, percent double precision, out rows bigint, out filled bigint, out waiting bigint)
language plpgsql volatile as $$
begin
    execute pg_catalog.format(
        'select pg_catalog.count(*), pg_catalog.count(t.%1$s), pg_catalog.count(*) filter (where %2$s and %3$s) from %4$s t %5$s',
        s.target, s.pending, autoembed.has_text(s.content), s.rows,
        case when percent operator(pg_catalog.<) 100::pg_catalog.float8
            then pg_catalog.format('tablesample system (%s)', percent) end)
    into rows, filled, waiting;
end
$$;

-- A sample of pages is off by a few percent. Statistics that it does not contradict know better: of what was written
-- since the last vacuum, or of what that vacuum found.
create function autoembed.likely_rows(
    relation oid, sampled double precision, deviation double precision) returns double precision
language sql volatile
begin atomic
    with known (written, found) as (
        select sum(pg_stat_get_live_tuples(l.oid))::double precision, sum(c.reltuples)::double precision
        from autoembed.family(relation) l (oid) join pg_catalog.pg_class c on c.oid = l.oid and c.relkind <> 'p'
    )
    select coalesce((select e.rows from known k, unnest(array[k.written, k.found]) e (rows)
                     where abs(e.rows - sampled) <= 4 * deviation
                     order by abs(e.rows - sampled) limit 1), sampled);
end;

-- Counts for one column of the caller's own table. Up to 100,000 rows are counted; of a larger table 1,000 random pages
-- are, and only what is pending is exact, up to 100,000 rows, since the partial index holds just that. `margin` is
-- twice the standard deviation of such a sample, as a share of the rows: one sample in twenty is farther off.
create function autoembed.own_counts(
    registration bigint, out total bigint, out embedded bigint, out pending bigint, out blank bigint,
    out exact boolean, out margin double precision)
language sql volatile
begin atomic
    with looked (s, pages, percent) as materialized (
        select s, p.pages, case when autoembed.row_estimate(s.relation) <= 100000 then 100
                           else least(100, 100 * 1000.0 / greatest(p.pages, 1)) end::double precision
        from autoembed.column_sql_of(registration) s
        cross join lateral (select autoembed.page_count(s.relation) as pages) p
    ), counted as materialized (
        select c.*, l.percent = 100 as whole, c.rows / (l.percent / 100) as sampled,
               sqrt((1 - l.percent / 100) / greatest(l.pages * l.percent / 100, 1)) as deviation,
               case when l.percent < 100 then autoembed.indexed_count(l.s) end as indexed, (l.s).relation as relation
        from looked l, autoembed.count_rows(l.s, l.percent) c
    ), sized as (
        select c.*, case when c.whole then c.rows
                    else autoembed.likely_rows(c.relation, c.sampled, c.sampled * c.deviation) end as likely
        from counted c
    ), shared as (
        select z.*, z.likely / nullif(z.rows, 0) * (z.rows - z.filled - z.waiting) as without_text,
               case when z.indexed <= 100000 then z.indexed
                    else z.likely / nullif(z.rows, 0) * z.waiting end as left_over
        from sized z
    )
    select h.likely::bigint, greatest(h.likely - coalesce(h.left_over, 0) - coalesce(h.without_text, 0), 0)::bigint,
           coalesce(h.left_over, 0)::bigint, coalesce(h.without_text, 0)::bigint, h.whole, 2 * h.deviation
    from shared h;
end;

-- Of others' tables what the statistics say, whoever looks: planning a query over a table can already run its owner's
-- code (an index on a constant expression) with the reader's rights, and any tenant can add a table to this view.
create function autoembed.counts(
    r autoembed.registration, out total bigint, out embedded bigint, out pending bigint, out blank bigint,
    out exact boolean, out margin double precision)
language plpgsql volatile as $$
begin
    if autoembed.is_own(r.relation) then
        select * into total, embedded, pending, blank, exact, margin from autoembed.own_counts(r.id);
    else
        select k.*, null into total, embedded, pending, blank, exact, margin from autoembed.known_counts(r) k;
    end if;
end
$$;

-- null: a table that holds something was never analyzed
create function autoembed.known_rows(relation oid) returns bigint
language sql volatile
begin atomic
    select case when bool_and(c.reltuples >= 0 or pg_stat_get_live_tuples(c.oid) > 0 or pg_relation_size(c.oid) = 0)
                then autoembed.row_estimate(relation) end
    from autoembed.family(relation) l (oid)
    join pg_catalog.pg_class c on c.oid = l.oid and c.relkind <> 'p';
end;

create function autoembed.known_pending(relation oid, target smallint) returns bigint
language sql volatile
begin atomic
    select case when bool_and(t.reltuples >= 0 or pg_relation_size(t.oid) = 0)
        then sum(greatest(c.reltuples, 0))::bigint end
    from autoembed.pending_indexes(relation, target) p
    cross join lateral autoembed.family(p) l (oid)
    join pg_catalog.pg_class c on c.oid = l.oid and c.relkind <> 'I'
    join pg_catalog.pg_index i on i.indexrelid = l.oid
    join pg_catalog.pg_class t on t.oid = i.indrelid;
end;

create function autoembed.known_counts(
    r autoembed.registration, out total bigint, out embedded bigint, out pending bigint, out blank bigint,
        out exact boolean)
language sql volatile
begin atomic
    select k.total, case k.total < k.pending when true then 0 when false then k.total - k.pending end, k.pending,
        null::bigint, false
    from (select autoembed.known_rows((r).relation) as total,
        autoembed.known_pending((r).relation, (r).target) as pending) k;
end;

-- when the oldest of the next thousand pending rows was written; only with track_commit_timestamp
create function autoembed.oldest_pending(registration bigint) returns timestamptz
language plpgsql volatile set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off set jit = off as $$
declare
    s autoembed.column_sql := autoembed.column_sql_of(registration);
    oldest pg_catalog.timestamptz;
begin
    if pg_catalog.current_setting('track_commit_timestamp') operator(pg_catalog.<>) 'on' then
        return null;
    end if;
    execute pg_catalog.format(
        'select pg_catalog.min(pg_catalog.pg_xact_commit_timestamp(c.xmin))
            from (select t.xmin from %s t where %s order by %s limit 1000) c
         where pg_catalog.age(c.xmin) operator(pg_catalog.<) 1000000000', s.rows, s.pending, s.ordering) into oldest;
    return oldest;
end
$$;

-- rows a second over the last five minutes in which rows were embedded
create function autoembed.rate(registration bigint) returns double precision
language sql volatile
begin atomic
    select sum(u.embedded) / nullif(extract(epoch from clock_timestamp()
               - min(u.finished - make_interval(secs => u.claim_seconds + u.encode_seconds + u.write_seconds))),
                   0)::double precision
    from autoembed.run u
    where u.registration = rate.registration and u.finished > clock_timestamp() - '5 minutes'::interval;
end;

-- not all seventeen digits
create function autoembed.figure(value double precision, digits integer) returns double precision
language sql immutable
begin atomic
    select round(value::numeric, digits)::double precision;
end;

create view embedding_progress with (security_invoker = true) as
select r.relation::regclass as relation, autoembed.column_name(r.relation, r.target) as target,
       c.total, c.embedded,
       case c.pending < f.failed + f.waiting when true then 0 when false
           then c.pending - f.failed - f.waiting end as pending,
       c.blank, f.failed, f.waiting, t.truncated,
       autoembed.figure(p.rate, 2) as rows_per_second,
       case when c.pending = 0 then '0'::interval
            when p.rate > 0
                then make_interval(secs => round((c.pending / p.rate)::numeric)::double precision) end as time_left,
       case when autoembed.is_own(r.relation)
           then clock_timestamp() - autoembed.oldest_pending(r.id) end as oldest_pending,
       c.exact, autoembed.figure(c.margin, 3) as margin
from autoembed.registration r
cross join lateral autoembed.counts(r) c
cross join lateral (select count(*) filter (where x.next_try is null) as failed,
                           count(*) filter (where x.next_try is not null) as waiting
                    from autoembed.failure x where x.registration = r.id) f
cross join lateral (select count(*) as truncated from autoembed.truncation x where x.registration = r.id) t
cross join lateral (select autoembed.rate(r.id) as rate) p
where has_any_column_privilege(r.relation, 'select') and autoembed.key_index(r.relation) is not null
    and autoembed.is_sound(r);

create view embedding_throughput with (security_invoker = true) as
select date_trunc('minute', u.finished) as minute, r.relation::regclass as relation,
       autoembed.column_name(r.relation, r.target) as target, u.model,
       sum(u.embedded) as rows, sum(u.failed) as failed, sum(u.skipped) as skipped, sum(u.tokens)::bigint as tokens,
       autoembed.figure(sum(u.embedded) / nullif(sum(u.claim_seconds + u.encode_seconds + u.write_seconds), 0),
           2) as rows_per_second,
       autoembed.figure(sum(u.tokens)::double precision / nullif(sum(u.claim_seconds + u.encode_seconds + u.write_seconds), 0), 2) as tokens_per_second,
       autoembed.figure(sum(u.claim_seconds), 3) as claim_seconds,
           autoembed.figure(sum(u.encode_seconds), 3) as encode_seconds,
       autoembed.figure(sum(u.write_seconds), 3) as write_seconds
from autoembed.run u
join autoembed.registration r on r.id = u.registration
group by 1, 2, 3, 4
order by 1 desc, 2, 3;

create view embedding_failures with (security_invoker = true) as
select r.relation::regclass as relation, autoembed.column_name(r.relation, r.target) as target,
       autoembed.key_object(r.relation, f.key) as key, f.kind, f.message, f.attempts, f.last_try, f.next_try
from autoembed.failure f
join autoembed.registration r on r.id = f.registration;

create view embedding_truncations with (security_invoker = true) as
select r.relation::regclass as relation, autoembed.column_name(r.relation, r.target) as target,
       autoembed.key_object(r.relation, t.key) as key, t.tokens, t.token_limit
from autoembed.truncation t
join autoembed.registration r on r.id = t.registration;

-- for the progress of a call: what is in the partial index, held back or not; more than 100,000 is 100,001
create function autoembed.pending_count(registration bigint) returns bigint
language sql volatile
begin atomic
    select autoembed.indexed_count(autoembed.column_sql_of(registration));
end;
