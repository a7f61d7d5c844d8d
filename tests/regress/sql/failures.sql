-- Texts that cannot be embedded stand alone, and are tried again
\set VERBOSITY sqlstate
create table draft (id int primary key, body text, embedding vector(16));
insert into draft values (1, 'a fine text'), (2, 'a raiseword text'), (3, 'a nanword text'), (4, 'another fine text');
select embed_column('draft', 'body', model => 'stub-16');
call embed_pending() \gset
\echo :embedded :failed :skipped
select key, kind, message, attempts, next_try > now() as later from embedding_failures order by key;
select embedded, pending, failed, waiting from embedding_progress;
call embed_pending() \gset
\echo :embedded :failed :skipped
update draft set body = 'mended' where id = 2;
call embed_pending() \gset
\echo :embedded :failed :skipped
select embed_retry('draft');
call embed_pending() \gset
\echo :embedded :failed :skipped
select key, kind, attempts from embedding_failures order by key;
drop table draft;
select count(*) from embedding_failures;
