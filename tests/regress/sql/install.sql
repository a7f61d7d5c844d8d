-- What the extension is, and what it finds. Models are stubs: 16 and 384 dimensions, and no weights.
\set VERBOSITY sqlstate
set client_min_messages = warning;
create extension pg_autoembed cascade;
reset client_min_messages;
select e.extname, n.nspname from pg_extension e join pg_namespace n on n.oid = e.extnamespace order by 1;
select name, status, dimensions, max_tokens from embedding_models;
select name from embedding_settings order by name;
select count(*) = 0 as nothing_is_declared from embedding_columns;
-- nothing that runs a model is for everybody
select p.proname from pg_proc p join pg_depend d on d.classid = 'pg_proc'::regclass and d.objid = p.oid and d.deptype = 'e'
join pg_extension e on d.refobjid = e.oid and e.extname = 'pg_autoembed'
where p.pronamespace = e.extnamespace and has_function_privilege('public', p.oid, 'execute') order by 1;
