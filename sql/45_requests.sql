-- How state is written: by request.
--
-- Nobody but the extension writes the tables of state. Whoever may write a table may lock it as well, and would hold up
-- every fill and every ALTER TABLE of the database; and whoever may choose the keys of rows can have another's collide
-- with them. So a declaration, a fill, a retry insert a request. The trigger below looks whether the request's role
-- owns the relation, changes the state, and keeps no request. To others' requests nothing happens.
--
-- The role of a request is nobody's to choose: a trigger that runs as the caller writes it, whatever the INSERT says. A
-- column's default would not do, for a view over this table has defaults of its own. A security definer function cannot
-- know its caller, and one that is told could be told anything.
create table autoembed.request (
    role name not null,
    registration bigint,  -- null where it is yet to be made
    action text not null,
    arguments jsonb not null
);

-- Fires first, by its name.
create function autoembed.name_role() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
    new.role := current_user;
    return new;
end
$$;

create trigger name_role before insert on autoembed.request for each row execute function autoembed.name_role();
alter table autoembed.request enable always trigger name_role;

create function autoembed.request(registration bigint, action text, arguments jsonb default '{}') returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
    insert into autoembed.request (registration, action, arguments)
    values (request.registration, request.action, request.arguments);
end
$$;

-- Security definer, since it writes what nobody else may. It runs no user's code: it reads catalogs and writes state.
-- jit is off because the caller's planner settings hold here as well, and what is switched off counts as expensive.
create function autoembed.serve_request() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp set jit = off as $$
declare
    relation oid := case when new.action = 'declare' then (new.arguments ->> 'relation')::oid
                         else (select r.relation from autoembed.registration r where r.id = new.registration) end;
begin
    if not exists (select from pg_class c where c.oid = relation and pg_has_role(new.role, c.relowner, 'usage')) then
        return null;
    end if;
    case new.action
        when 'declare' then perform autoembed.register(new.arguments);
        when 'change' then perform autoembed.change_registration(new.registration, new.arguments);
        when 'note trigger' then perform autoembed.note_row_trigger(new.registration, new.arguments);
        when 'record inflight' then perform autoembed.write_inflight(new.registration, new.arguments);
        when 'forget inflight' then perform autoembed.drop_inflight(new.registration, new.arguments);
        when 'settle' then perform autoembed.write_outcome(new.registration, new.arguments);
        when 'recover' then perform autoembed.make_suspects(new.registration);
        when 'drop suspects' then perform autoembed.drop_suspects(new.registration, new.arguments);
        when 'set frontier' then perform autoembed.write_frontier(new.registration, new.arguments);
        when 'tidy' then perform autoembed.drop_old_records(new.registration, new.arguments);
        when 'retry' then perform autoembed.drop_failures(new.registration);
        when 'drop' then perform autoembed.drop_registration(new.registration);
    end case;
    return null;
end
$$;

create trigger serve_request before insert on autoembed.request for each row execute function autoembed.serve_request();
alter table autoembed.request enable always trigger serve_request;

-- Keys travel in a request as one jsonb array.
create function autoembed.elements(list jsonb) returns jsonb[]
language sql immutable
begin atomic
    select array(select u.element from jsonb_array_elements(list) with ordinality as u (element, n) order by u.n);
end;

create function autoembed.register(declaration jsonb) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    registered autoembed.registration;
begin
    insert into autoembed.registration (relation, target, sources, model, fingerprint, mode, enabled, options,
        row_trigger)
    select d.*
    from jsonb_to_record(declaration) as d (
        relation oid, target smallint, sources smallint[], model text, fingerprint text, mode text, enabled boolean,
        options jsonb, row_trigger oid)
    on conflict do nothing
    returning * into registered;
    if registered.id is not null and not autoembed.is_sound(registered) then
        raise exception using errcode = 'object_not_in_prerequisite_state',
            message = format('%s cannot have an embedding column with these source and target columns',
                registered.relation::regclass),
            hint = 'Declare columns with embed_column, which says what is wrong.';
    end if;
end
$$;

-- With another model, or another text made of the same columns, what was recorded of the former fills goes.
create function autoembed.change_registration(registration bigint, change jsonb) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
    update autoembed.registration r
    set mode = d.mode, enabled = d.enabled, options = d.options, model = d.model, fingerprint = d.fingerprint,
        generation = r.generation + d.reset::integer
    from jsonb_to_record(change) as d (mode text, enabled boolean, options jsonb, model text, fingerprint text,
        reset boolean)
    where r.id = change_registration.registration;
    if (change ->> 'reset')::boolean then
        delete from autoembed.failure f where f.registration = change_registration.registration;
        delete from autoembed.truncation f where f.registration = change_registration.registration;
    end if;
end
$$;

create function autoembed.note_row_trigger(registration bigint, trigger jsonb) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
    update autoembed.registration r set row_trigger = (trigger ->> 'oid')::oid
        where r.id = note_row_trigger.registration;
end
$$;

create function autoembed.drop_registration(registration bigint) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
    delete from autoembed.registration r where r.id = drop_registration.registration;
end
$$;
