-- Who fills what. A fill fires the table's triggers, constraints and index expressions with the caller's rights, and
-- no SET ROLE or SECURITY DEFINER contains them: so a superuser fills only tables that it owns itself.

-- whose state rows the current user reads and writes
create function autoembed.owns(relation oid) returns boolean
language sql stable
begin atomic
    select pg_has_role(c.relowner, 'usage') from pg_catalog.pg_class c where c.oid = relation;
end;

create function autoembed.check_owner(relation oid) returns void
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
    if autoembed.owns(relation) is not true then
        raise exception using errcode = 'insufficient_privilege',
            message = format('must be owner of %s', relation::regclass);
    end if;
end
$$;

-- Is the caller the owner of the relation and of all its partitions, and nobody greater behind a SET ROLE?
-- In PL/pgSQL, as all that is asked in each transaction of a fill: its plans outlive the call, those of SQL functions
-- are made each time, and cost more than a claim. Step by step: a join would read all of pg_class.
create function autoembed.is_own(relation oid) returns boolean
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
    me oid := (select r.oid from pg_roles r where r.rolname = current_user);
    owner oid;
    kind "char";
begin
    select c.relowner, c.relkind into owner, kind from pg_class c where c.oid = is_own.relation;
    if owner is distinct from me or exists (
        select from pg_roles r where r.rolname = session_user and r.rolsuper and r.oid <> owner) then
        return false;
    end if;
    -- of a plain table nothing more: to ask for a tree takes time
    return kind <> 'p' or not exists (
        select from autoembed.family(is_own.relation) m
        where (select c.relowner from pg_class c where c.oid = m) <> owner);
end
$$;

-- The bare check. Called again in each transaction of a fill, under the relation's lock.
create function autoembed.authorize(relation oid) returns void
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
    if autoembed.is_own(relation) then
        return;
    end if;
    if exists (select from pg_roles r where r.rolname in (current_user, session_user) and r.rolsuper) then
        raise exception using errcode = 'insufficient_privilege',
            message = format('a superuser does not fill %s, which others own in part or whole', relation::regclass),
            detail = 'Filling runs the triggers, constraints and index expressions of the table''s owner with the caller''s rights; '
                     'a trigger can RESET ROLE.',
            hint = format('Connect as %s.', (select c.relowner::regrole from pg_class c where c.oid = relation));
    end if;
    if not (has_table_privilege(relation, 'update') and has_any_column_privilege(relation, 'select')) then
        raise exception using errcode = 'insufficient_privilege',
            message = format('permission denied to fill %s', relation::regclass),
            hint = 'The owner fills it, or a role with SELECT and UPDATE on the table.';
    end if;
end
$$;

-- Lock the relation against changes of its registration (those take SHARE ROW EXCLUSIVE, as CREATE TRIGGER does) and
-- check it again: between two transactions it may have been dropped, renamed, given away or swapped for another.
-- Returns the column_sql of now, null where there is none any more, or one with another model: the caller would mix two
-- models' vectors. To make a column_sql from the catalogs each time would cost more than the claim itself.
create function autoembed.lock_column(s autoembed.column_sql) returns autoembed.column_sql
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    fingerprint text := s.fingerprint;
begin
    if not autoembed.lock_relation(s.name) or not autoembed.is_current(s) then
        s := autoembed.column_sql_of(s.registration);
        if s.relation is null or s.fingerprint <> fingerprint or not autoembed.lock_relation(s.name)
            or not autoembed.is_current(s) then
            return null;
        end if;
    end if;
    perform autoembed.authorize(s.relation);
    return s;
end
$$;

create function autoembed.lock_relation(name text, mode text default 'row exclusive mode') returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
    execute format('lock table %s in %s', name, mode);
    return true;
exception when undefined_table or invalid_schema_name or wrong_object_type then
    return false;
end
$$;

-- Each change of a registration, and each ALTER TABLE of its relation, makes a new generation.
create function autoembed.is_current(s autoembed.column_sql) returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
    return exists (
        select from autoembed.registration r
        join pg_class c on c.oid = r.relation
        join pg_namespace n on n.oid = c.relnamespace
        where r.id = s.registration and r.generation = s.generation and r.enabled = s.enabled
          and c.oid = s.relation and format('%I.%I', n.nspname, c.relname) = s.name);
end
$$;


-- may the current user read every row of the relation, and fill it?
create function autoembed.reads_all(registration bigint) returns boolean
language sql stable
begin atomic
    select coalesce((
        select has_table_privilege(r.relation, 'select') and has_any_column_privilege(r.relation, 'update')
               and not row_security_active(r.relation)
        from autoembed.registration r where r.id = reads_all.registration), false);
end;
