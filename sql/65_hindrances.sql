-- What keeps a declared column from being filled, or its vectors from following their texts, as the catalogs have it:
-- the status of embedding_columns, and so a row of embedding_health. What comes first, is said. Nobody is waited for
-- here: no relation is locked, and no row of one is read.

create function autoembed.relation_hindrance(r autoembed.registration) returns text
language sql stable
begin atomic
    select case
        when c.relkind not in ('r', 'p') then 'the relation is no table any more'
        when exists (select from autoembed.key_trouble(c.oid)) then
            (select 'no key: ' || min(k.reason) from autoembed.key_trouble(c.oid) k)
        when not autoembed.is_sound(r) then 'source and target are not of types that can be served any more'
        when not autoembed.has_pending_index(c.oid, (r).target) then
            'no pending index: call embed_column with if_not_exists => true'
        when autoembed.update_rule(c.oid) is not null then
            format('rule %I rewrites the UPDATEs of a fill', autoembed.update_rule(c.oid))
        end
    from pg_catalog.pg_class c where c.oid = (r).relation;
end;

create function autoembed.target_hindrance(r autoembed.registration) returns text
language sql stable
begin atomic
    select min(case
        when a.attnotnull then format('%s.%I is NOT NULL: no row can wait there for its vector', m::regclass, t.name)
        when autoembed.has_default(m, t.name) then
            format('%s.%I has a default: new rows get that instead of a vector', m::regclass, t.name) end)
    from (select autoembed.column_name((r).relation, (r).target) as name) t
    cross join autoembed.family((r).relation) m
    join pg_catalog.pg_attribute a on a.attrelid = m and a.attname = t.name and (a.attnotnull or a.atthasdef);
end;

create function autoembed.trigger_hindrance(r autoembed.registration) returns text
language sql stable
begin atomic
    select case
        when autoembed.row_trigger(r) is null then 'no row trigger: call embed_column with if_not_exists => true'
        when d.rows is not null then
            format('the row trigger on %s is off, no vector follows its text: alter table ... enable trigger all',
                   d.rows)
        when (r).mode = 'immediate' and d.statements is not null then
            format('a statement trigger on %s is off, which immediate mode needs: alter table ... enable trigger all',
                   d.statements)
        when (r).mode = 'immediate'
            and exists (select from autoembed.missing_statement_triggers((r).relation, d.target)) then
            'immediate mode lacks a statement trigger: call embed_column with if_not_exists => true'
        when (r).mode = 'immediate' and c.relispartition then
            'immediate mode does not see rows that come by way of the partitioned table: declare that one' end
    from pg_catalog.pg_class c
    cross join lateral (
        select n.target,
               min(t.tgrelid::regclass::text) filter (where t.tgfoid = 'autoembed.invalidate()'::regprocedure) as rows,
               min(t.tgrelid::regclass::text) filter (where t.tgfoid = 'autoembed.embed_rows()'::regprocedure)
                   as statements
        from (select autoembed.column_name((r).relation, (r).target) as target) n
        left join pg_catalog.pg_trigger t
            on t.tgrelid in (select m from autoembed.family((r).relation) m) and t.tgenabled in ('D', 'R')
           and t.tgfoid in ('autoembed.invalidate()'::regprocedure, 'autoembed.embed_rows()'::regprocedure)
           and (autoembed.arguments_of(t.oid))[1] = n.target::text
        group by n.target) d
    where c.oid = (r).relation;
end;

-- Does row-level security hide rows of the relation from its owner, as far as that is plain? A policy whose condition
-- is not simply true may hide some.
create function autoembed.hides_rows(relation oid) returns boolean
language sql stable
begin atomic
    with policy as materialized (
        select p.polcmd, p.polpermissive,
               pg_get_expr(p.polqual, p.polrelid) = 'true'
               and coalesce(pg_get_expr(p.polwithcheck, p.polrelid), 'true') = 'true' as is_open
        from pg_catalog.pg_policy p join pg_catalog.pg_class c on c.oid = p.polrelid
        where p.polrelid = relation and p.polcmd in ('*', 'r', 'w')
          and (0 = any (p.polroles)
               or exists (select from unnest(p.polroles) u (role) where pg_has_role(c.relowner, u.role, 'usage')))
    )
    select c.relrowsecurity and c.relforcerowsecurity and not o.rolsuper and not o.rolbypassrls
           and (exists (select from policy p where not p.polpermissive and p.is_open is not true)
                or not exists (select from policy p where p.polpermissive and p.is_open and p.polcmd in ('*', 'r'))
                or not exists (select from policy p where p.polpermissive and p.is_open and p.polcmd in ('*', 'w')))
    from pg_catalog.pg_class c join pg_catalog.pg_roles o on o.oid = c.relowner
    where c.oid = relation;
end;

create function autoembed.rights_hindrance(r autoembed.registration) returns text
language sql stable
begin atomic
    select case
        when not (has_schema_privilege(c.relowner, c.relnamespace, 'usage')
                  and has_table_privilege(c.relowner, c.oid, 'update')
                  and has_table_privilege(c.relowner, c.oid, 'select')) then
            format('the owner %I may not read and update the relation', pg_get_userbyid(c.relowner))
        when o.relowner is not null then
            format('partition %s belongs to %I: only a fill that names the relation serves it',
                   o.oid::regclass, pg_get_userbyid(o.relowner))
        when autoembed.hides_rows(c.oid) then
            'row-level security is forced on the owner: rows that its policies hide are not filled'
        when (r).mode = 'immediate' and not autoembed.may_declare(c.relowner) then
            format('immediate mode needs the owner %I to have EXECUTE on embed_column', pg_get_userbyid(c.relowner)) end
    from pg_catalog.pg_class c
    left join lateral (select p.oid, p.relowner from autoembed.family(c.oid) m join pg_catalog.pg_class p on p.oid = m
                       where p.relowner <> c.relowner order by p.oid limit 1) o on true
    where c.oid = (r).relation;
end;

create function autoembed.has_identity(relation oid) returns boolean
language sql stable
begin atomic
    select c.relreplident = 'f'
        or exists (select from pg_catalog.pg_index i where i.indrelid = c.oid and i.indisvalid and i.indimmediate
                   and case c.relreplident when 'd' then i.indisprimary when 'i' then i.indisreplident end)
    from pg_catalog.pg_class c where c.oid = relation;
end;

create function autoembed.is_published(relation oid) returns boolean
language sql stable
begin atomic
    with named as materialized (
        select c.oid, c.relnamespace from pg_catalog.pg_class c
        where c.oid = relation or c.oid in (select a.relid from pg_partition_ancestors(relation) a)
    )
    select exists (
        select from pg_catalog.pg_publication p
        where p.pubupdate
          and (p.puballtables
               or exists (select from pg_catalog.pg_publication_rel t
                          where t.prpubid = p.oid and t.prrelid in (select n.oid from named n))
               or exists (select from pg_catalog.pg_publication_namespace t
                          where t.pnpubid = p.oid and t.pnnspid in (select n.relnamespace from named n))));
end;

-- PostgreSQL refuses an UPDATE of what a publication publishes where no row has an identity.
create function autoembed.publication_hindrance(relation oid) returns text
language sql stable
begin atomic
    select format('a publication publishes the UPDATEs of %s, which has no replica identity',
                  min(c.oid::regclass::text))
    from autoembed.family(relation) m
    join pg_catalog.pg_class c on c.oid = m and c.relkind = 'r' and c.relpersistence = 'p'
    where exists (select from pg_catalog.pg_publication p where p.pubupdate)
      and not autoembed.has_identity(c.oid) and autoembed.is_published(c.oid)
    having count(*) > 0;
end;

create function autoembed.hindrance(r autoembed.registration) returns text
language sql stable
begin atomic
    select coalesce(autoembed.relation_hindrance(r), autoembed.target_hindrance(r), autoembed.trigger_hindrance(r),
                    autoembed.rights_hindrance(r), autoembed.publication_hindrance((r).relation));
end;

-- Is the column declared, with all that a declaration makes? Then declaring it once more takes no lock.
create function autoembed.is_whole(relation oid, target name) returns boolean
language sql stable
begin atomic
    select exists (
        select from autoembed.registration r
        where r.relation = is_whole.relation and autoembed.column_name(r.relation, r.target) = is_whole.target
          and autoembed.trigger_hindrance(r) is null and autoembed.has_pending_index(r.relation, r.target)
          and not autoembed.is_outdated(r));
end;
