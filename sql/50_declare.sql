-- Declaring, changing and dropping columns.

create function autoembed.refuse(relation regclass, reason text, help text) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
    raise exception using errcode = 'object_not_in_prerequisite_state',
        message = format('%s cannot have an embedding column: %s', relation, reason), hint = help;
end
$$;

-- Why the relation's rows cannot be told apart, and what to do; no row: they can.
create function autoembed.key_trouble(relation oid, out reason text, out help text)
returns setof record
language sql stable
begin atomic
    with late as (
        select (select string_agg(pg_get_indexdef(i.indexrelid, n, false), ', ' order by n)
                from generate_series(1, i.indnkeyatts) n) as columns
        from pg_catalog.pg_index i
        where i.indrelid = relation and i.indisunique and not i.indimmediate
        order by i.indisprimary desc limit 1
    )
    select case when d.columns is null then 'it has neither a primary key nor a unique key without nulls'
                else 'its key is deferrable: for a while two rows may have the same' end,
           case when d.columns is null then 'Add one, for example: '
                    'alter table ... add column id bigint generated always as identity primary key.'
                else format('Add one that is not: alter table %s add unique (%s)', relation::regclass, d.columns) end
    from (select autoembed.key_index(relation) as index) k left join late d on true
    where k.index is null
    union all
    select 'its key has a type that cannot serve here',
           'Use a key of built-in scalar types, for example a bigint or a uuid.'
    from autoembed.key_columns(relation) k
    having bool_or(k.equals is null or k.greater is null or not k.scalar)
        or count(*) > 1 and not bool_and(coalesce(k.greater, '') = 'operator(pg_catalog.>)');
end;

-- A fill's UPDATE stands in a WITH, which PostgreSQL refuses where a rule would rewrite it.
create function autoembed.update_rule(relation oid) returns name
language sql stable
begin atomic
    select min(r.rulename::text)::name from pg_catalog.pg_rewrite r
    where r.ev_class = relation and r.ev_type = '2' and r.ev_enabled in ('O', 'A');
end;

create function autoembed.check_relation(relation regclass) returns void
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
    kind "char" := (select c.relkind from pg_class c where c.oid = relation);
begin
    if kind in ('v', 'm') then
        perform autoembed.refuse(relation, 'it is a view', 'Declare the table beneath it.');
    elsif kind = 'f' then
        perform autoembed.refuse(relation, 'it is a foreign table', 'Declare the table where it is stored.');
    elsif kind not in ('r', 'p') then
        perform autoembed.refuse(relation, 'it is not a table', 'Name a table.');
    elsif kind = 'r' and exists (select from pg_inherits i where i.inhparent = relation) then
        perform autoembed.refuse(relation, 'other tables inherit from it',
            'Declare each of them, or use partitioning.');
    elsif exists (select from pg_inherits i join pg_class c on c.oid = i.inhrelid
                  where i.inhrelid = relation and c.relispartition) then
        perform autoembed.refuse(relation, 'it is a partition', 'Declare the partitioned table.');
    elsif exists (select from pg_class c where c.oid = relation and c.relpersistence = 't') then
        perform autoembed.refuse(relation, 'it is a temporary table', 'Use embed() for texts of one session.');
    elsif exists (select from pg_class c where c.oid = relation
                  and (c.relnamespace::regnamespace::text in ('pg_catalog', 'information_schema', 'autoembed'))) then
        perform autoembed.refuse(relation, 'it belongs to the system', 'Name a table of your own.');
    elsif autoembed.update_rule(relation) is not null then
        perform autoembed.refuse(relation, format('rule %I rewrites its UPDATEs', autoembed.update_rule(relation)),
            'Use a trigger instead of the rule.');
    end if;
    perform autoembed.refuse(relation, k.reason, k.help) from autoembed.key_trouble(relation) k;
end
$$;

create function autoembed.check_source(relation regclass, source name) returns smallint
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
    a pg_attribute;
begin
    select * into a from pg_attribute x where x.attrelid = relation and x.attname = source and x.attnum > 0
        and not x.attisdropped;
    if a.attnum is null then
        raise exception using errcode = 'undefined_column',
            message = format('relation %s has no column %I', relation, source),
            hint = 'Name the column, or an array of columns, that holds the text.';
    elsif not autoembed.is_text(a.atttypid) then
        raise exception using errcode = 'datatype_mismatch',
            message = format('source column %I of %s is of type %s', source, relation,
                format_type(a.atttypid, a.atttypmod)),
            hint = 'A source column is of type text, varchar, char, citext or a domain over one of these.';
    elsif a.attgenerated <> '' then
        perform autoembed.refuse(relation, format('source column %I is generated', source),
            'Name the columns that it is generated from: triggers cannot see a generated column change.');
    end if;
    return a.attnum;
end
$$;

create function autoembed.has_default(relation oid, target name) returns boolean
language sql stable
begin atomic
    select exists (
        select from pg_catalog.pg_attribute a
        join pg_catalog.pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
        where a.attrelid = relation and a.attname = target and not pg_get_expr(d.adbin, d.adrelid) ~* '^null(::|$)');
end;

create function autoembed.check_target(relation regclass, target name, model text, dimensions integer) returns smallint
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
    a pg_attribute;
    found_type text;
begin
    select * into a from pg_attribute x where x.attrelid = relation and x.attname = target and x.attnum > 0
        and not x.attisdropped;
    found_type := format_type(a.atttypid, a.atttypmod);
    if a.attnum is null then
        raise exception using errcode = 'undefined_column',
            message = format('relation %s has no column %I', relation, target),
            hint = format('Add it: alter table %s add column %I vector(%s)', relation, target,
                coalesce(dimensions, 768));
    elsif not autoembed.is_vector(a.atttypid) then
        raise exception using errcode = 'datatype_mismatch',
            message = format('target column %I of %s is of type %s, not vector', target, relation, found_type),
            hint = format('Use a column of type vector(%s).', coalesce(dimensions, 768));
    elsif a.atttypmod <> dimensions then
        raise exception using errcode = 'datatype_mismatch',
            message = format('target column %I of %s is %s, but model %s has %s dimensions', target, relation,
                             case when a.atttypmod > 0 then found_type else 'a vector without dimensions' end, model,
                                 dimensions),
            hint = format('alter table %s alter column %I type vector(%s), or name a model that fits.', relation,
                target, dimensions);
    elsif a.attnotnull then
        perform autoembed.refuse(relation, format('target column %I is NOT NULL', target),
            format('A row waits for its vector with a null there: alter table %s alter column %I drop not null',
                relation, target));
    elsif a.attgenerated <> '' then
        perform autoembed.refuse(relation, format('target column %I is generated', target), 'Use a plain column.');
    elsif autoembed.has_default(relation, target) then
        perform autoembed.refuse(relation, format('target column %I has a default', target),
            format('New rows get it instead of a vector: alter table %s alter column %I drop default',
                   relation, target));
    end if;
    return a.attnum;
end
$$;

-- Volatile, or the planner would call it with its constant argument whether its row is wanted or not.
create function autoembed.not_yet(option text) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
    raise exception using errcode = 'feature_not_supported',
        message = format('%s is an option that this release does not serve yet', option),
        hint = format('Leave %s out.', option);
end
$$;

create function autoembed.check_mode(mode text) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
    if (mode in ('deferred', 'immediate')) is not true then
        raise exception using errcode = 'invalid_parameter_value',
            message = format('mode %L is unknown', mode), hint = 'The modes are deferred and immediate.';
    end if;
end
$$;

-- The options of a column, as its registration and its row trigger keep them: those that are not the default.
create function autoembed.check_options(
    relation regclass, sources name[], template text, cache boolean, track boolean, writes text)
returns jsonb
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
    perform autoembed.not_yet('cache') where cache is not false;
    perform autoembed.not_yet('track') where track is not false;
    if (writes in ('fill', 'anyone')) is not true then
        raise exception using errcode = 'invalid_parameter_value', message = format('writes is %L', writes),
            hint = 'writes is fill (only the fill sets the vectors) or anyone (an UPDATE may bring a vector of its own).';
    end if;
    return jsonb_strip_nulls(jsonb_build_object(
        'template', autoembed.bind_template(relation, sources, nullif(template, '')), 'writes',
            nullif(writes, 'fill')));
end
$$;

create function embed_column(
    relation regclass, source name[], target name default 'embedding', model text default null,
    mode text default 'deferred', if_not_exists boolean default false, template text default null,
    cache boolean default false, track boolean default false, destination name default null, writes text default 'fill')
returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    m record;
    sources smallint[];
    target_number smallint;
    id bigint;
    declared name[];
    declared_options jsonb;
    whole boolean;
    options jsonb;
begin
    if relation is null or source is null or cardinality(source) = 0 or array_position(source, null) is not null
        or target is null then
        raise exception using errcode = 'null_value_not_allowed',
            message = 'embed_column needs a relation, one source column or more, and a target column';
    end if;
    perform autoembed.check_mode(mode);
    perform autoembed.not_yet('destination') where destination is not null;
    options := autoembed.check_options(relation, source, template, cache, track, writes);
    perform autoembed.check_relation(relation);
    perform autoembed.check_owner(relation);
    whole := autoembed.is_whole(relation, target);
    if not (whole and if_not_exists) then
        -- Against a second declaration at the same time, and against writers that would miss the new triggers. The
        -- strongest lock that is needed comes first: to ask for a stronger one later is to wait for readers that wait
        -- for this one as they write.
        execute format('lock table %s in access exclusive mode', relation);
        whole := autoembed.is_whole(relation, target);
    end if;
    select g.id, autoembed.column_names(g.relation, g.sources), g.options
    into id, declared, declared_options
    from autoembed.registration g join pg_attribute a on a.attrelid = g.relation and a.attnum = g.target
    where g.relation = embed_column.relation and a.attname = embed_column.target;
    if id is not null then
        if if_not_exists then
            perform autoembed.install(id) where not whole;
            if declared <> source then
                raise warning using message = format('column %I of %s stays declared for other source columns: %s',
                    target, relation, array_to_string(declared, ', ')),
                    hint = 'To change them: embed_column_drop, embed_column, and set the vectors to null.';
            end if;
            if declared_options <> options then
                raise warning using
                    message = format('column %I of %s stays declared with other options', target, relation),
                    hint = 'Change them with embed_column_set.';
            end if;
            raise notice using message = format('column %I of %s is declared already, %s', target, relation,
                case when whole then 'nothing changed' else 'its pending index was made anew' end);
            return;
        end if;
        raise exception using errcode = 'duplicate_object',
            message = format('column %I of %s is declared already', target, relation),
            hint = 'Change it with embed_column_set, drop it with embed_column_drop, or pass if_not_exists => true.';
    end if;
    perform autoembed.check_relation(relation);
    select * into m from autoembed.model(embed_column.model);
    if (select count(distinct u) < count(*) from unnest(source) u) then
        raise exception using errcode = 'duplicate_column',
            message = format('the source of column %I of %s names a column twice', target, relation),
                hint = 'Name each source column once.';
    end if;
    sources := array(select autoembed.check_source(relation, u.name) from unnest(source) with ordinality as u (name, n)
        order by n);
    target_number := autoembed.check_target(relation, target, m.name, m.dimensions);

    perform autoembed.request(null, 'declare', jsonb_build_object(
        'relation', relation::oid, 'target', target_number, 'sources', sources, 'model', m.name, 'fingerprint',
            m.fingerprint,
        'mode', mode, 'enabled', true, 'options', options));
    id := autoembed.find(relation, target);
    perform autoembed.install(id);
    perform autoembed.say_existing(id);
end
$$;

comment on function embed_column( regclass, name[], name, text, text, boolean, text, boolean, boolean, name, text) is
    'Declares a vector column: from now on it is filled from the source columns and kept current.';

create function embed_column(
    relation regclass, source name, target name default 'embedding', model text default null,
    mode text default 'deferred', if_not_exists boolean default false, template text default null,
    cache boolean default false, track boolean default false, destination name default null, writes text default 'fill')
returns void
language sql volatile
begin atomic
    select embed_column(relation, array[source], target, model, mode, if_not_exists,
                        template, cache, track, destination, writes);
end;

-- Vectors that are there already are taken as the writer's word; say so, since they may be of another model.
create function autoembed.say_existing(registration bigint) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    s autoembed.column_sql := autoembed.column_sql_of(registration);
    filled boolean;
begin
    -- Planning a query over another's table evaluates its owner's index expressions, with the caller's rights.
    if not autoembed.is_own(s.relation) then
        raise notice using message = format('%s keeps the vectors that it may have already', s.label),
            hint = format('If they are not of model %s: update %s set %s = null', s.model, s.name, s.target);
        return;
    end if;
    execute format('select exists (select from %s t where t.%s is not null)', s.rows, s.target) into filled;
    if filled then
        raise notice using message = format('%s has vectors already: they are kept as they are', s.label),
            hint = format('If they are not of model %s: update %s set %s = null', s.model, s.name, s.target);
    end if;
end
$$;

create function embed_column_set(
    relation regclass, target name, mode text default null, model text default null, enabled boolean default null,
    template text default null, cache boolean default null, track boolean default null, writes text default null)
returns void
language plpgsql volatile as $$
begin
    if autoembed.change(relation, target, mode, model, enabled, template, cache, track, writes) then
        perform autoembed.clear(autoembed.find(relation, target));
    end if;
end
$$;

-- Another model's vectors may have another number of dimensions: the column gets another type, empty. The row trigger
-- goes first, since PostgreSQL changes no column that a trigger names, and is made anew by the caller.
create function autoembed.resize(registration bigint, dimensions integer) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    r autoembed.registration;
    s autoembed.column_sql := autoembed.column_sql_of(registration);
begin
    select * into r from autoembed.registration g where g.id = resize.registration;
    perform autoembed.request(r.id, 'note trigger', '{"oid": null}');
    execute format('drop trigger %I on %s', (select t.tgname from pg_trigger t where t.oid = autoembed.row_trigger(r)),
                   r.relation::regclass);
    execute format('alter table %s alter column %s type %s(%s) using null', s.name, s.target, s.type, dimensions);
end
$$;

-- true where the model is another one now
create function autoembed.change(
    relation regclass, target name, mode text, model text, enabled boolean,
    template text, cache boolean, track boolean, writes text)
returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    declared bigint;
    r autoembed.registration;
    m record;
    s autoembed.column_sql;
    other boolean := false;
begin
    perform autoembed.check_mode(coalesce(mode, 'deferred'));
    if model is not null then
        select * into m from autoembed.model(change.model);
    end if;
    -- The strongest lock that is needed comes first: to ask for a stronger one later is to wait for writers that wait
    -- for this one.
    execute format('lock table %s in access exclusive mode', relation);
    declared := autoembed.find(relation, target);
    perform autoembed.check_owner(relation);
    select * into r from autoembed.registration g where g.id = declared;
    s := autoembed.column_sql_of(r.id);
    r.mode := coalesce(mode, r.mode);
    r.enabled := coalesce(enabled, r.enabled);
    r.options := autoembed.check_options(
        relation, s.sources, coalesce(template, autoembed.template_text(r.options ->> 'template', s.sources)),
        coalesce(cache, false), coalesce(track, false), coalesce(writes, r.options ->> 'writes', 'fill'));
    if model is not null then
        if m.dimensions <> s.dimensions then
            perform autoembed.resize(r.id, m.dimensions);
        end if;
        perform autoembed.check_target(relation, target, m.name, m.dimensions);
        other := (m.name, m.fingerprint) is distinct from (r.model, r.fingerprint);
        r.model := m.name;
        r.fingerprint := m.fingerprint;
    end if;
    perform autoembed.request(r.id, 'change', to_jsonb(r) || jsonb_build_object('reset', other));
    if not other and s.content is distinct from (autoembed.column_sql_of(r.id)).content then
        perform autoembed.request(r.id, 'change', to_jsonb(r) || jsonb_build_object('reset', true));
        other := true;
    end if;
    perform autoembed.install(r.id);
    return other;
end
$$;

comment on function embed_column_set(regclass, name, text, text, boolean, text, boolean, boolean, text) is
    'Changes a column''s mode, model, template or writes, pauses it (enabled => false) or lets it go on. A new '
    'model or template clears the column, since vectors of two never mix.';

-- search_path stays the session's: the table's own triggers fire here
create function autoembed.clear(registration bigint) returns void
language plpgsql volatile as $$
declare
    s autoembed.column_sql := autoembed.column_sql_of(registration);
    filled pg_catalog.bool;
    cleared pg_catalog.int8;
begin
    perform autoembed.authorize(s.relation);  -- first: planning evaluates the owner's index expressions
    execute pg_catalog.format('select exists (select from %s t where t.%s is not null)', s.rows, s.target) into filled;
    if not filled then
        return;
    end if;
    execute pg_catalog.format('update %s t set %2$s = null where t.%2$s is not null', s.rows, s.target);
    get diagnostics cleared = row_count;
    raise notice using message = pg_catalog.format('%s: %s of the former model cleared, to be computed again', s.label,
                                                autoembed.counted(cleared, 'vector', 'vectors'));
end
$$;

create function embed_column_drop(relation regclass, target name default 'embedding') returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    declared bigint;
    r autoembed.registration;
begin
    execute format('lock table %s in access exclusive mode', relation);
    declared := autoembed.find(relation, target);
    perform autoembed.check_owner(relation);
    select * into r from autoembed.registration g where g.id = declared;
    perform autoembed.request(r.id, 'drop');
    perform autoembed.drop_triggers(r.relation, autoembed.row_trigger(r), target);
    perform autoembed.drop_pending_index(r.relation, r.target);
end
$$;

comment on function embed_column_drop(regclass, name) is
    'Stops the embedding of a column. Its vectors stay; triggers, pending index and state go.';
