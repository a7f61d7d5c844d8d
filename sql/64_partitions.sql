-- Partitions that come and go, seen by the event triggers.
--
-- PostgreSQL gives a partition its own copy of the row trigger when it comes, and takes it away when it goes. Between
-- the two nothing would clear a vector whose text changes, and no statement trigger is copied at all. So a partition
-- that is detached stays declared, as a table of its own, and loses that declaration again when it is attached.

-- Brings what is known of a declared table's partitions up to date. The first look is at what a declaration, or a dump
-- that is being restored, has found or made: nothing is new then.
create function autoembed.follow_partitions(r autoembed.registration) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    is_first boolean := not exists (select from autoembed.partition p where p.registration = r.id);
    partition oid;
begin
    for partition in
        insert into autoembed.partition (registration, relation)
        select r.id, m from autoembed.family(r.relation) m
        where not exists (select from autoembed.partition p where p.registration = r.id and p.relation = m)
        on conflict do nothing  -- an old snapshot does not see what another session has just taken in
        returning autoembed.partition.relation
    loop
        if not is_first then
            perform autoembed.take_in(r, partition);
        end if;
    end loop;
    for partition in
        delete from autoembed.partition p
        where p.registration = r.id and p.relation not in (select m from autoembed.family(r.relation) m)
        returning p.relation
    loop
        perform autoembed.let_go(r, partition);
    end loop;
end
$$;

-- A partition has come. Vectors that it brings along are taken as they are, where nothing says that they are others.
create function autoembed.take_in(r autoembed.registration, partition oid) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    vectors name := autoembed.column_name(r.relation, r.target);
    own autoembed.registration;
begin
    select * into own from autoembed.registration g
    where g.relation = partition and autoembed.column_name(g.relation, g.target) = vectors;
    if own.id is not null and autoembed.meaning_of(own) <> autoembed.meaning_of(r) then
        raise exception using errcode = 'object_not_in_prerequisite_state',
            message = format('column %I of %s is declared otherwise than that of %s: their vectors would mix',
                             vectors, partition::regclass, r.relation::regclass),
            hint = format('Before it is attached: select embed_column_drop(%L, %L); update %s set %I = null',
                          partition::regclass, vectors, partition::regclass, vectors);
    elsif own.id is not null then
        delete from autoembed.registration g where g.id = own.id;
        perform autoembed.drop_trigger(partition, t.tgname) from pg_trigger t where t.oid = autoembed.row_trigger(own);
        perform autoembed.merge_pending_index(own);
    elsif pg_relation_size(partition) > 0 then
        raise notice using
            message = format('%s.%I keeps the vectors that it may have already', partition::regclass, vectors),
            hint = format('If they are not of model %s, or older than their texts: update %s set %I = null',
                          r.model, partition::regclass, vectors);
    end if;
    perform autoembed.install_statement_triggers(r.id);
end
$$;

-- A partition has gone: as a table of its own it stays declared. What is under it went along.
create function autoembed.let_go(r autoembed.registration, partition oid) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    own autoembed.registration;
begin
    if (select c.relispartition from pg_class c where c.oid = partition) is not false then
        return;
    end if;
    own := r;
    own.id := nextval('autoembed.registration_id_seq');
    own.relation := partition;
    own.target := autoembed.column_number(partition, autoembed.column_name(r.relation, r.target));
    own.sources := array(
        select autoembed.column_number(partition, s.name)
        from unnest(autoembed.column_names(r.relation, r.sources)) with ordinality as s (name, n) order by s.n);
    own.generation := 1;
    own.row_trigger := null;
    insert into autoembed.registration overriding system value select own.* on conflict do nothing;
    if found then
        perform autoembed.keep_pending_index(r, own);
        perform autoembed.install(own.id);
        raise notice using
            message = format('%s.%I stays declared, as a table of its own', partition::regclass,
                             autoembed.column_name(own.relation, own.target)),
            hint = format('Where nothing is to be embedded any more: select embed_column_drop(%L, %L)',
                          partition::regclass, autoembed.column_name(own.relation, own.target));
    end if;
end
$$;

-- What decides the vectors of a column, and how they come about.
create function autoembed.meaning_of(r autoembed.registration) returns jsonb
language sql stable
begin atomic
    select to_jsonb(r) - array['id', 'relation', 'target', 'mode', 'enabled', 'generation', 'row_trigger', 'options']
           || jsonb_build_object('template', (r).options -> 'template',
                                 'sources', autoembed.column_names((r).relation, (r).sources));
end;

create function autoembed.column_number(relation oid, name name) returns smallint
language sql stable
begin atomic
    select a.attnum from pg_catalog.pg_attribute a
    where a.attrelid = relation and a.attname = name and not a.attisdropped;
end;

-- PostgreSQL makes a partition's index a part of the table's where they are alike: only one that is not must go.
create function autoembed.merge_pending_index(own autoembed.registration) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    index regclass;
    is_part boolean;
begin
    for index, is_part in
        select p, c.relispartition from autoembed.pending_indexes(own.relation, own.target) p
            join pg_class c on c.oid = p
    loop
        execute format(case when is_part then 'alter index %s no depends on extension pg_autoembed'
                            else 'drop index %s' end, index);
    end loop;
end
$$;

-- The index that was a part of the table's pending index serves the partition by itself.
create function autoembed.keep_pending_index(r autoembed.registration, own autoembed.registration) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    index oid;
begin
    for index in
        select i.indexrelid from pg_index i
        where i.indrelid = own.relation and i.indpred is not null
          and substring(pg_get_indexdef(i.indexrelid) from ' USING .*') in (
              select substring(pg_get_indexdef(p) from ' USING .*')
                  from autoembed.pending_indexes(r.relation, r.target) p)
    loop
        execute format('alter index %s depends on extension pg_autoembed', index::regclass);
    end loop;
end
$$;
