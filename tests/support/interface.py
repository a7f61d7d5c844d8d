"""What users call and read, as text: a change of it shows in tests/golden/interface.txt, and so in a review."""

from __future__ import annotations

import re

from .server import Connection
from .snapshot import GRANTS

MEMBERS = """
    select d.classid, d.objid as oid, e.extnamespace as schema, e.extowner as owner
    from pg_depend d join pg_extension e on e.oid = d.refobjid
    where d.refclassid = 'pg_extension'::regclass and d.deptype = 'e' and e.extname = 'pg_autoembed'
"""
FUNCTIONS = f"""
    select case o.prokind when 'p' then 'procedure' else 'function' end, o.proname, pg_get_function_arguments(o.oid),
           concat_ws('; ', 'returns ' || pg_get_function_result(o.oid),
                     case o.provolatile when 'i' then 'immutable' when 's' then 'stable' else 'volatile' end,
                     'parallel ' ||
                     case o.proparallel when 'u' then 'unsafe' when 'r' then 'restricted' else 'safe' end,
                     case when o.proisstrict then 'strict' end, case when o.prosecdef then 'security definer' end,
                     array_to_string(o.proconfig, '; ')),
           {GRANTS.format(acl="coalesce(o.proacl, acldefault('f', o.proowner))")}, obj_description(o.oid, 'pg_proc')
    from ({MEMBERS}) m join pg_proc o on m.classid = 'pg_proc'::regclass and o.oid = m.oid
    where o.pronamespace = m.schema
    order by 2, 3
"""
RELATIONS = f"""
    select case o.relkind when 'v' then 'view' else o.relkind::text end, o.relname, array_to_string(o.reloptions, ', '),
           {GRANTS.format(acl="coalesce(o.relacl, acldefault('r', o.relowner))")}, obj_description(o.oid, 'pg_class'),
           (select array_agg(concat_ws(' ', a.attname, format_type(a.atttypid, a.atttypmod),
                                       '-- ' || col_description(o.oid, a.attnum)) order by a.attnum)
            from pg_attribute a where a.attrelid = o.oid and a.attnum > 0 and not a.attisdropped)
    from ({MEMBERS}) m join pg_class o on m.classid = 'pg_class'::regclass and o.oid = m.oid
    where o.relnamespace = m.schema
    order by 1, 2
"""


def interface(connection: Connection) -> str:
    """Objects in the schema that the extension was installed into; state and helpers have a schema of their own."""
    with connection.transaction():
        connection.execute("set local search_path = pg_catalog")  # all other names appear with their schema
        functions = [function(*row) for row in connection.execute(FUNCTIONS.encode())]
        relations = [relation(*row) for row in connection.execute(RELATIONS.encode())]
    return re.sub(r"\bpublic\.", "", "\n".join([*functions, *relations]))


def function(kind: str, name: str, arguments: str, facts: str, grants: list[str], comment: str | None) -> str:
    lines = [f"        {each}" for each in re.split(r", (?=[^)]* )", arguments) if each]
    return entry(f"{kind} {name}(" + "".join(f"\n{line}," for line in lines).rstrip(",") + ")", facts, grants, comment)


def relation(
    kind: str, name: str, options: str | None, grants: list[str], comment: str | None, columns: list[str]
) -> str:
    return entry(f"{kind} {name}", options or "", grants, comment) + "".join(f"        {each}\n" for each in columns)


def entry(head: str, facts: str, grants: list[str], comment: str | None) -> str:
    others = sorted(grant for grant in grants if not grant.startswith("owner "))
    lines = [
        facts,
        f"granted to {', '.join(others)}" if others else "granted to nobody",
        f"-- {comment or 'no comment'}",
    ]
    return "\n".join([head, *(f"    {line}" for line in lines if line), ""])
