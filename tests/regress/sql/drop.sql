-- The extension goes, and leaves the tables with their vectors behind
\set VERBOSITY sqlstate
create table kept (id int primary key, body text, embedding vector(16));
insert into kept values (1, 'one');
select embed_column('kept', 'body', model => 'stub-16');
call embed_pending() \gset
drop extension pg_autoembed;
select count(embedding) as vectors from kept;
select count(*) as triggers from pg_trigger where tgrelid = 'kept'::regclass;
select count(*) as indexes from pg_index where indrelid = 'kept'::regclass;
select nspname from pg_namespace where nspname = 'autoembed';
drop table kept;
