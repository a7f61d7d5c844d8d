-- The door to Python. Every body is a call into the package; start() is the one place that finds it.
--
-- PL/Python hangs a traceback on each error that it raises. So what Python refuses on purpose it returns, as the OUT
-- argument `refusal`, and a function around the one in Python raises that: no user sees a traceback of what was
-- foreseen. A caller's right to the outer function is not handed on to the inner one. So the inner ones are open to
-- all, and those that run a model ask may_call (99_privileges.sql) whether the caller may call the outer one.

-- Puts the package's own directory first on the path, so that nothing the server's user installed can shadow it,
-- and says whether package and extension fit. Called once a session, by the first function that needs Python.
create function autoembed.start() returns void
language plpython3u volatile parallel unsafe as $$
import site, sys
sys.path[:] = ["@SITE@", *(p for p in sys.path if p not in ("@SITE@", "", site.getusersitepackages()))]
from autoembed.server.session import start
start(plpy, GD, api_version=1)
$$;

create type autoembed.refusal as (message text, detail text, hint text, sqlstate text);

-- Raises what was refused; true where nothing was. RAISE takes no null.
create function autoembed.accepted(refusal autoembed.refusal) returns boolean
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
    if refusal is null then
        return true;
    end if;
    case when refusal.detail is null and refusal.hint is null then
        raise exception using errcode = refusal.sqlstate, message = refusal.message;
    when refusal.detail is null then
        raise exception using errcode = refusal.sqlstate, message = refusal.message, hint = refusal.hint;
    when refusal.hint is null then
        raise exception using errcode = refusal.sqlstate, message = refusal.message, detail = refusal.detail;
    else
        raise exception using errcode = refusal.sqlstate, message = refusal.message, detail = refusal.detail,
            hint = refusal.hint;
    end case;
end
$$;

create function autoembed.encode_text(content text, model text, prompt text, out vector vector,
    out refusal autoembed.refusal)
language plpython3u stable parallel unsafe as $$
if "autoembed 1" not in GD: plpy.execute("select autoembed.start()")
return GD["autoembed 1"].encode_text(content, model, prompt)
$$;

create function embed(content text, model text default null, prompt text default null) returns vector
language plpgsql stable parallel unsafe as $$
declare
    answer record;
begin
    if content is null then
        return null;
    end if;
    answer := autoembed.encode_text(content, model, prompt);
    if not (answer.refusal is null) then
        perform autoembed.accepted(answer.refusal);
    end if;
    return answer.vector;
end
$$;

comment on function embed(text, text, text) is
    'Returns the vector of a text. prompt names one of the model''s prompts, as query or document.';

create function autoembed.encode_texts(contents text[], model text, prompt text, out vectors vector[],
    out refusal autoembed.refusal)
language plpython3u stable parallel unsafe as $$
if "autoembed 1" not in GD: plpy.execute("select autoembed.start()")
return GD["autoembed 1"].encode_texts(contents, model, prompt)
$$;

create function embed(contents text[], model text default null, prompt text default null) returns vector[]
language plpgsql stable parallel unsafe as $$
declare
    answer record;
begin
    answer := autoembed.encode_texts(contents, model, prompt);
    if not (answer.refusal is null) then
        perform autoembed.accepted(answer.refusal);
    end if;
    return answer.vectors;
end
$$;

comment on function embed(text[], text, text) is
    'Returns the vectors of many texts, computed in one pass. Their order is kept, and null stays null.';

-- A driver sends a list without its type, and embed() then takes the array's literal for one text. This takes no other.
create function embed_texts(contents text[], model text default null, prompt text default null) returns vector[]
language plpgsql stable parallel unsafe as $$
declare
    answer record;
begin
    answer := autoembed.encode_texts(contents, model, prompt);
    if not (answer.refusal is null) then
        perform autoembed.accepted(answer.refusal);
    end if;
    return answer.vectors;
end
$$;

comment on function embed_texts(text[], text, text) is
    'Does what embed(text[]) does, and takes arrays alone: for drivers that send a list without its type.';

create function autoembed.find_model(
    model text, out name text, out dimensions integer, out max_tokens integer, out fingerprint text,
        out refusal autoembed.refusal)
language plpython3u stable parallel unsafe as $$
if "autoembed 1" not in GD: plpy.execute("select autoembed.start()")
return GD["autoembed 1"].find_model(model)
$$;

-- The model that a name stands for (null: the server's default), from its manifest; 22023 where there is none.
create function autoembed.model(
    model text, out name text, out dimensions integer, out max_tokens integer, out fingerprint text)
language sql stable parallel unsafe
begin atomic
    select m.name, m.dimensions, m.max_tokens, m.fingerprint
    from autoembed.find_model(model) m where autoembed.accepted(m.refusal);
end;

create function autoembed.list_models(
    out name text, out status text, out dimensions integer, out max_tokens integer, out architecture text,
    out "precision" text, out fingerprint text, out bytes bigint, out note text, out refusal autoembed.refusal)
returns setof record
language plpython3u stable parallel unsafe as $$
if "autoembed 1" not in GD: plpy.execute("select autoembed.start()")
return GD["autoembed 1"].list_models()
$$;

create function autoembed.models(
    out name text, out status text, out dimensions integer, out max_tokens integer, out architecture text,
    out "precision" text, out fingerprint text, out bytes bigint, out note text)
returns setof record
language sql stable parallel unsafe
begin atomic
    select m.name, m.status, m.dimensions, m.max_tokens, m.architecture, m."precision", m.fingerprint, m.bytes, m.note
    from autoembed.list_models() m where autoembed.accepted(m.refusal);
end;

create function autoembed.list_settings(out name text, out value text, out source text, out refusal autoembed.refusal)
returns setof record
language plpython3u stable parallel unsafe as $$
if "autoembed 1" not in GD: plpy.execute("select autoembed.start()")
return GD["autoembed 1"].list_settings()
$$;

create function autoembed.settings(out name text, out value text, out source text)
returns setof record
language sql stable parallel unsafe
begin atomic
    select s.name, s.value, s.source from autoembed.list_settings() s where autoembed.accepted(s.refusal);
end;
