-- The door to Python. Every body is a call into the package; start() is the one place that finds it.

-- Puts the package's own directory first on the path, so that nothing the server's user installed can shadow it,
-- and says whether package and extension fit. Called once a session, by the first function that needs Python.
create function autoembed.start() returns void
language plpython3u volatile parallel unsafe as $$
import site, sys
sys.path[:] = ["@SITE@", *(p for p in sys.path if p not in ("@SITE@", "", site.getusersitepackages()))]
from autoembed.server.session import start
start(plpy, GD, api_version=1)
$$;

create function embed(content text, model text default null, prompt text default null) returns vector
language plpython3u stable parallel unsafe as $$
if "autoembed 1" not in GD: plpy.execute("select autoembed.start()")
return GD["autoembed 1"].embed_one(content, model, prompt)
$$;

comment on function embed(text, text, text) is 'the vector of a text; prompt names one of the model''s prompts, as query or document';

create function embed(contents text[], model text default null, prompt text default null) returns vector[]
language plpython3u stable parallel unsafe as $$
if "autoembed 1" not in GD: plpy.execute("select autoembed.start()")
return GD["autoembed 1"].embed_many(contents, model, prompt)
$$;

comment on function embed(text[], text, text) is 'the vectors of many texts in one pass: order kept, null stays null';

-- A driver sends a list without its type, and embed() then takes the array's literal for one text. This takes no other.
create function embed_texts(contents text[], model text default null, prompt text default null) returns vector[]
language plpython3u stable parallel unsafe as $$
if "autoembed 1" not in GD: plpy.execute("select autoembed.start()")
return GD["autoembed 1"].embed_many(contents, model, prompt)
$$;

comment on function embed_texts(text[], text, text) is
    'as embed(text[]), under a name that takes arrays alone: for drivers that send a list without its type';

-- The model that a name stands for (null: the server's default), from its manifest; 22023 where there is none.
create function autoembed.model(
    model text, out name text, out dimensions integer, out max_tokens integer, out fingerprint text)
language plpython3u stable parallel unsafe as $$
if "autoembed 1" not in GD: plpy.execute("select autoembed.start()")
return GD["autoembed 1"].model(model)
$$;

create function autoembed.models(
    out name text, out status text, out dimensions integer, out max_tokens integer, out architecture text,
    out "precision" text, out fingerprint text, out bytes bigint, out note text)
returns setof record
language plpython3u stable parallel unsafe as $$
if "autoembed 1" not in GD: plpy.execute("select autoembed.start()")
return GD["autoembed 1"].list_models()
$$;

create function autoembed.settings(out name text, out value text, out source text)
returns setof record
language plpython3u stable parallel unsafe as $$
if "autoembed 1" not in GD: plpy.execute("select autoembed.start()")
return GD["autoembed 1"].list_settings()
$$;
