-- What a call fills, what it counts, and what it refuses
\set VERBOSITY sqlstate
create table fact (id int primary key, body text, embedding vector(16));
insert into fact select g, case g % 10 when 0 then ' ' when 9 then null else 'fact ' || g end from generate_series(1, 100) g;
select embed_column('fact', 'body', model => 'stub-16');
select total, embedded, pending, blank, failed, exact from embedding_progress;
call embed_pending(batch => 8, max_rows => 20) \gset
\echo :embedded :failed :skipped
select total, embedded, pending, blank, failed from embedding_progress;
call embed_pending() \gset
\echo :embedded :failed :skipped
call embed_pending(relation => 'fact') \gset
\echo :embedded :failed :skipped
select count(*) as filled, bool_and(embedding = embed(body, 'stub-16', 'document')) as own from fact where embedding is not null;
select count(*) as not_filled, bool_and(coalesce(body, '') !~ '[^[:space:]]') as blank from fact where embedding is null;
select count(*) as left_behind from pg_locks where locktype = 'advisory';

call embed_pending(batch => 0);
begin;
call embed_pending();
rollback;
call embed_pending(relation => 'pg_class');
call embed_wait('fact', '1 second');
drop table fact;
