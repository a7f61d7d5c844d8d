-- Immediate mode: statement triggers that embed a statement's new rows in one pass.

-- Immediate mode: the statement's new rows in one pass. Never makes the statement fail because a model did.
create function autoembed.embed_rows() returns trigger
language plpython3u as $$
if "autoembed 1" not in GD:
    try: plpy.execute("select autoembed.start()")
    except plpy.SPIError as error:
        if getattr(error, "sqlstate", "").startswith("57"): raise
        return plpy.warning("new rows stay pending: the Python package of pg_autoembed does not load")
GD["autoembed 1"].embed_rows(int(TD["relid"]), TD["args"][0])
$$;

-- What embed_rows asks for: which registration, and the query over the transition table. Nothing where the writer may
-- not write the vector, the column is paused, or the owner was never given embed_column.
create function autoembed.immediate(
    relation oid, target name, out registration bigint, out generation bigint, out model text, out fingerprint text,
    out label text, out dimensions integer, out column_sql text, out query text)
returns setof record
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
    r autoembed.registration;
    s autoembed.column_sql;
begin
    select g.* into r
    from autoembed.registration g
    where g.relation = immediate.relation and autoembed.column_name(g.relation, g.target) = immediate.target
      and g.enabled and g.mode = 'immediate';
    s := autoembed.column_sql_of(r.id);
    if s.relation is null
        or not has_any_column_privilege(s.relation, 'select')
        or not has_table_privilege(s.relation, 'update')
        or not has_function_privilege((select c.relowner from pg_class c where c.oid = s.relation),
                                      '@extschema@.embed_column(regclass,name[],name,text,text,boolean,text,boolean,boolean,name,text)',
                                      'execute') then
        return;
    end if;
    registration := s.registration;
    generation := s.generation;
    model := s.model;
    fingerprint := s.fingerprint;
    label := s.label;
    dimensions := s.dimensions;
    column_sql := s::text;
    query := format('select %s as key, %s as content, autoembed.hash(%2$s) as hash from autoembed_new t
                     where %s and %2$s collate pg_catalog."C" operator(pg_catalog.~) ''[^[:space:]]''',
                    s.key, s.content, s.pending);
    return next;
end
$$;

-- Of a target that is null: those that name no column of the relation any more.
create function autoembed.statement_triggers(relation oid, target name) returns setof name
language sql stable
begin atomic
    select t.tgname
    from pg_catalog.pg_trigger t
    cross join lateral (select (autoembed.arguments_of(t.oid))[1] as target) named
    where t.tgrelid = relation and t.tgfoid = 'autoembed.embed_rows()'::regprocedure
      and case when statement_triggers.target is not null then named.target = statement_triggers.target::text
               else not exists (select from pg_catalog.pg_attribute a
                                where a.attrelid = relation and a.attname::text = named.target
                                  and not a.attisdropped) end;
end;

create function autoembed.install_statement_triggers(registration bigint) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    r autoembed.registration;
    target name := autoembed.target_name(registration);
    trigger name;
    event text;
begin
    select * into r from autoembed.registration g where g.id = install_statement_triggers.registration;
    for trigger in select * from autoembed.statement_triggers(r.relation, target) loop
        execute format('drop trigger %I on %s', trigger, r.relation::regclass);
    end loop;
    if r.mode <> 'immediate' then
        return;
    end if;
    foreach event in array array['insert', 'update'] loop
        trigger := autoembed.free_trigger_name(r.relation, format('~autoembed_%s_%s', autoembed.cut(target, 40), event));
        execute format(
            'create trigger %I after %s on %s referencing new table as autoembed_new for each statement execute function autoembed.embed_rows(%L)',
            trigger, event, r.relation::regclass, target);
        execute format('alter trigger %I on %s depends on extension pg_autoembed', trigger, r.relation::regclass);
    end loop;
end
$$;
