-- Models stay loaded in a session; here they are loaded, freed, and shown.

create function autoembed.load_model(model text, out name text, out refusal autoembed.refusal)
language plpython3u volatile parallel unsafe as $$
if "autoembed 1" not in GD: plpy.execute("select autoembed.start()")
return GD["autoembed 1"].load_model(model)
$$;

create function embed_load(model text default null) returns text
language sql volatile parallel unsafe
begin atomic
    select m.name from autoembed.load_model(model) m where autoembed.accepted(m.refusal);
end;

comment on function embed_load(text) is
    'Loads a model into this session, so that its first embedding is quick, and returns the model''s name.';

create function autoembed.unload_models(out count integer, out refusal autoembed.refusal)
language plpython3u volatile parallel unsafe as $$
if "autoembed 1" not in GD: plpy.execute("select autoembed.start()")
return GD["autoembed 1"].unload_models()
$$;

create function embed_unload() returns integer
language sql volatile parallel unsafe
begin atomic
    select u.count from autoembed.unload_models() u where autoembed.accepted(u.refusal);
end;

comment on function embed_unload() is
    'Frees the models that this session has loaded, and returns how many there were.';

-- Whose sessions' models the current user sees: those of its own roles, or all.
create function autoembed.visible_pids() returns setof integer
language sql stable
begin atomic
    select a.pid from pg_catalog.pg_stat_activity a
    where pg_has_role(a.usesysid, 'usage') or pg_has_role('pg_read_all_stats', 'usage');
end;

create function autoembed.list_sessions(
    out pid integer, out model text, out device text, out preloaded boolean, out loaded_at double precision,
    out load_seconds double precision, out texts bigint, out private_bytes bigint, out shared_bytes bigint,
    out refusal autoembed.refusal)
returns setof record
language plpython3u volatile parallel unsafe as $$
if "autoembed 1" not in GD: plpy.execute("select autoembed.start()")
return GD["autoembed 1"].list_sessions()
$$;

-- A row for each model that a session has loaded. The memory is its whole process's: `private` is what only it has,
-- `shared` also counts what comes from files, as the weights and the server's shared buffers do.
create view embedding_sessions with (security_invoker = true) as
select s.pid, a.datname as database, a.usename as role, s.model, s.device, s.preloaded, s.texts,
       to_timestamp(s.loaded_at) as loaded_at, make_interval(secs => s.load_seconds) as load_time,
       s.private_bytes, s.shared_bytes
from autoembed.list_sessions() s
left join pg_catalog.pg_stat_activity a on a.pid = s.pid
where autoembed.accepted(s.refusal);
