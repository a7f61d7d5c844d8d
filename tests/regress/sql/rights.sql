-- Whoever owns a table fills it, with the grants of the reference; nobody else does
\set VERBOSITY sqlstate
\set superuser :USER
create role regress_owner login;
create role regress_stranger login;
create schema workshop;
grant all on schema workshop to regress_owner, regress_stranger;
\c - regress_owner
create table workshop.part (id int primary key, body text, embedding vector(16));
insert into workshop.part values (1, 'one'), (2, 'two');
select embed_column('workshop.part', 'body', model => 'stub-16');
select embed('a text');
\c - :superuser
do $$
begin
    execute (select string_agg(format('grant execute on routine %s to regress_owner', p.oid::regprocedure), ';')
             from pg_proc p where p.proname in ('embed_column', 'embed_pending'));
end
$$;
\c - regress_owner
select embed_column('workshop.part', 'body', model => 'stub-16');
call embed_pending() \gset
\echo :embedded :failed :skipped
insert into workshop.part values (3, 'three');
\c - :superuser
-- a superuser does not run another's triggers unasked
call embed_pending() \gset
\echo :embedded :failed :skipped
call embed_pending(relation => 'workshop.part');
\c - regress_stranger
call embed_pending();
select count(*) from embedding_progress;
\c - :superuser
drop owned by regress_owner, regress_stranger cascade;
drop schema workshop;
drop role regress_owner, regress_stranger;
