-- complain when the script is read by psql instead of create extension
\echo Use "create extension pg_autoembed cascade" to load this file. \quit

-- This runs as superuser with the extension's schema on the path. A function there with the name of one of PostgreSQL's
-- may match a call better than PostgreSQL's own, and would run with a superuser's rights: so not among strangers' ones.
-- The same stands at the head of each upgrade. Nothing here is looked up by the path.
do $$
declare
    stranger pg_catalog.text;
begin
    select p.oid::pg_catalog.regprocedure::pg_catalog.text into stranger
    from pg_catalog.pg_proc p
    join pg_catalog.pg_roles o on o.oid operator(pg_catalog.=) p.proowner
    where p.pronamespace operator(pg_catalog.=) '@extschema@'::pg_catalog.regnamespace and not o.rolsuper
      and exists (select from pg_catalog.pg_proc c
                  where c.proname operator(pg_catalog.=) p.proname
                      and c.pronamespace operator(pg_catalog.=) 'pg_catalog'::pg_catalog.regnamespace)
    union all
    select p.oid::pg_catalog.regoperator::pg_catalog.text
    from pg_catalog.pg_operator p
    join pg_catalog.pg_roles o on o.oid operator(pg_catalog.=) p.oprowner
    where p.oprnamespace operator(pg_catalog.=) '@extschema@'::pg_catalog.regnamespace and not o.rolsuper
      and exists (select from pg_catalog.pg_operator c
                  where c.oprname operator(pg_catalog.=) p.oprname
                      and c.oprnamespace operator(pg_catalog.=) 'pg_catalog'::pg_catalog.regnamespace)
    limit 1;
    if stranger is not null then
        raise exception using errcode = 'object_not_in_prerequisite_state',
            message = pg_catalog.concat('schema @extschema@ holds ', stranger,
                ', which has the name of one of PostgreSQL''s own and is no superuser''s'),
            detail = 'It could run with a superuser''s rights while the extension is installed or updated.',
            hint = 'Install the extension in a schema of its own, as in CREATE EXTENSION pg_autoembed SCHEMA ..., or rename what stands there.';
    end if;
end
$$;
