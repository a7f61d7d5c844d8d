-- Filling. A procedure that commits can be neither security definer nor carry a set clause.

create procedure autoembed.fill_pending(
    batch integer, relation oid, max_rows bigint, max_seconds integer,
    inout embedded bigint, inout failed bigint, inout skipped bigint, inout cached bigint,
        inout refusal autoembed.refusal)
language plpython3u as $$
if "autoembed 1" not in GD: plpy.execute("select autoembed.start()")
return GD["autoembed 1"].fill_pending(batch, relation, max_rows, max_seconds)
$$;

create procedure embed_pending(
    batch integer default null, relation regclass default null, max_rows bigint default null,
        max_seconds integer default null,
    inout embedded bigint default 0, inout failed bigint default 0, inout skipped bigint default 0,
    inout cached bigint default 0)
language plpgsql as $$
declare
    refusal autoembed.refusal;
begin
    call autoembed.fill_pending(batch, relation, max_rows, max_seconds, embedded, failed, skipped, cached, refusal);
    perform autoembed.accepted(refusal);
end
$$;

comment on procedure embed_pending(integer, regclass, bigint, integer, bigint, bigint, bigint, bigint) is
    'Fills what is pending, with a commit after each batch: in the named relation, or in all that the caller owns.';

create function embed_retry(relation regclass default null) returns bigint
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    tried bigint;
begin
    if relation is not null and not exists (select from autoembed.registration r
        where r.relation = embed_retry.relation) then
        raise exception using errcode = 'undefined_object',
            message = format('relation %s has no column declared for embedding', relation),
            hint = 'Declare one with embed_column(relation, source, target).';
    end if;
    with failed as (
        select f.registration, count(*) as rows
        from autoembed.failure f
        join autoembed.registration r on r.id = f.registration
        where autoembed.owns(r.relation) and (embed_retry.relation is null or r.relation = embed_retry.relation)
        group by f.registration
    )
    select coalesce(sum(f.rows), 0) into tried from failed f, autoembed.request(f.registration, 'retry');
    return tried;
end
$$;

create function autoembed.drop_failures(registration bigint) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
    with again as (
        delete from autoembed.failure f where f.registration = drop_failures.registration returning f.key, f.hash,
            f.kind
    )
    insert into autoembed.suspect (registration, key, hash, crashes)  -- what crashed the server is tried again alone
    select drop_failures.registration, a.key, a.hash, 2 from again a where a.kind = 'crashed'
    on conflict do nothing;
end
$$;

comment on function embed_retry(regclass) is
    'Forgets the failures, so that the next embed_pending tries those rows, and returns how many there were.';
