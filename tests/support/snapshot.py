"""What an extension has put into a database, in a form that can be compared with another database's.

Each object's facts (definition, privileges, initial privileges, comment) stand under its type and name. They depend
neither on oids nor on who owns the extension, nor on the name of the schema that it was installed into.
"""

from __future__ import annotations

import re
from typing import Any

from .server import Connection

Snapshot = dict[str, Any]

GRANTS = """(
    select jsonb_agg(distinct concat_ws(
        ' ', case x.grantee when 0 then 'public' when m.owner then 'owner' else x.grantee::regrole::text end,
        x.privilege_type, case when x.is_grantable then 'grantable' end))
    from aclexplode({acl}) x)"""


def grants(acl: str, owner: str, kind: str) -> str:
    """Whether the default privileges are written down or not makes no difference."""
    return GRANTS.format(acl=f"coalesce(o.{acl}, acldefault({kind}, o.{owner}))")


# attnum is left out: after ALTER TABLE … DROP COLUMN it has gaps, which nobody sees; and so is pg_attver, which some
# servers write into the options of every column by themselves: it is another number in each relation
COLUMNS = f"""(
    select jsonb_agg(jsonb_build_array(
               a.attname, format_type(a.atttypid, a.atttypmod), a.attcollation::regcollation, a.attnotnull,
               a.attidentity, a.attgenerated, pg_get_expr(f.adbin, f.adrelid), a.attstorage,
               (select jsonb_agg(x order by x) from unnest(a.attoptions) x where x not like 'pg_attver=%%'),
               {GRANTS.format(acl="a.attacl")}, col_description(a.attrelid, a.attnum)) order by a.attnum)
    from pg_attribute a left join pg_attrdef f on f.adrelid = a.attrelid and f.adnum = a.attnum
    where a.attrelid = {{relation}} and a.attnum > 0 and not a.attisdropped)"""

FUNCTION = f"""
    jsonb_build_object('definition', pg_get_functiondef(o.oid), 'owned', o.proowner = m.owner,
                       'grants', {grants("proacl", "proowner", "'f'")})"""
CLASS = """case o.relkind when 'S' then 's' else 'r' end::"char\""""
RELATION = f"""
    jsonb_build_object(
        'kind', o.relkind, 'persistence', o.relpersistence, 'options', o.reloptions,
        'replica identity', o.relreplident, 'owned', o.relowner = m.owner,
        'row security', jsonb_build_array(o.relrowsecurity, o.relforcerowsecurity),
        'columns', {COLUMNS.format(relation="o.oid")},
        'query', case when o.relkind in ('v', 'm') then pg_get_viewdef(o.oid) end,
        'sequence', (select to_jsonb(s) - 'seqrelid' from pg_sequence s where s.seqrelid = o.oid),
        'grants', {grants("relacl", "relowner", CLASS)})"""
TYPE = f"""
    jsonb_build_object(
        'kind', o.typtype, 'base', format_type(o.typbasetype, o.typtypmod), 'default', o.typdefault,
        'owned', o.typowner = m.owner, 'attributes', {COLUMNS.format(relation="o.typrelid")},
        'labels', (select jsonb_agg(l.enumlabel order by l.enumsortorder) from pg_enum l where l.enumtypid = o.oid),
        'checks', (select jsonb_agg(pg_get_constraintdef(c.oid) order by c.conname)
                   from pg_constraint c where c.contypid = o.oid),
        'grants', {grants("typacl", "typowner", "'T'")})"""
SCHEMA = f"""
    jsonb_build_object('owned', o.nspowner = m.owner, 'grants', {grants("nspacl", "nspowner", "'n'")})"""
EVENT_TRIGGER = """
    jsonb_build_object('event', o.evtevent, 'tags', o.evttags, 'enabled', o.evtenabled,
                       'function', o.evtfoid::regprocedure)"""

MEMBER = {
    "pg_proc": FUNCTION,
    "pg_class": RELATION,
    "pg_type": TYPE,
    "pg_namespace": SCHEMA,
    "pg_event_trigger": EVENT_TRIGGER,
}

# since PostgreSQL 17 the row type of a member relation is a member too: the relation tells all of it
STANDS_ALONE = {"pg_type": "coalesce((select relkind from pg_class where oid = o.typrelid), 'c') = 'c'"}

# what belongs to a member relation without being a member: its catalog, the column that names the relation, its facts
PARTS = {
    "pg_constraint": ("conrelid", "jsonb_build_array(pg_get_constraintdef(o.oid), o.convalidated)"),
    "pg_policy": (
        "polrelid",
        """jsonb_build_array(o.polcmd, o.polpermissive,
                             (select jsonb_agg(r::regrole order by r) from unnest(o.polroles) r),
                             pg_get_expr(o.polqual, o.polrelid), pg_get_expr(o.polwithcheck, o.polrelid))""",
    ),
    "pg_trigger": ("not tgisinternal and tgrelid", "jsonb_build_array(pg_get_triggerdef(o.oid), o.tgenabled)"),
    "pg_class": (
        "relkind in ('i', 'I') and (select i.indrelid from pg_index i where i.indexrelid = oid)",
        "to_jsonb(pg_get_indexdef(o.oid))",
    ),
}

OBJECT = """
    with member as (
        select d.classid, d.objid, e.extowner as owner
        from pg_depend d join pg_extension e on e.oid = d.refobjid
        where d.refclassid = 'pg_extension'::regclass and d.deptype = 'e' and e.extname = %(extension)s
    )
    select i.type || ' ' || i.identity, jsonb_build_object(
        'facts', {facts}, 'comment', obj_description(o.oid, '{catalog}'),
        'initial grants', (select jsonb_object_agg(p.objsubid, {initial}) from pg_init_privs p
                           where p.classoid = '{catalog}'::regclass and p.objoid = o.oid))
    from member m
    join {catalog} o on {condition}
    cross join lateral pg_identify_object('{catalog}'::regclass, o.oid, 0) i
"""
OTHERS = """
    select d.classid::regclass::text
    from pg_depend d join pg_extension e on e.oid = d.refobjid
    where d.refclassid = 'pg_extension'::regclass and d.deptype = 'e' and e.extname = %(extension)s
      and not d.classid::regclass::text = any (%(known)s)
"""
EXTENSION = """
    select jsonb_build_object(
        'version', e.extversion, 'relocatable', e.extrelocatable, 'comment', obj_description(e.oid, 'pg_extension'),
        'requires', (select jsonb_agg(r.extname order by r.extname)
                     from pg_depend d join pg_extension r on r.oid = d.refobjid
                     where d.classid = 'pg_extension'::regclass and d.objid = e.oid
                       and d.refclassid = 'pg_extension'::regclass),
        'dumped', (select jsonb_object_agg(u.relation::regclass, u.condition)
                   from unnest(e.extconfig, e.extcondition) as u (relation, condition))),
        quote_ident(n.nspname)
    from pg_extension e join pg_namespace n on n.oid = e.extnamespace where e.extname = %(extension)s
"""


def objects() -> list[str]:
    """A query for each kind: an object's name and its facts."""
    initial = GRANTS.format(acl="p.initprivs")
    kinds = [
        (c, facts, f"m.classid = '{c}'::regclass and o.oid = m.objid and {STANDS_ALONE.get(c, 'true')}")
        for c, facts in MEMBER.items()
    ]
    for catalog, (relation, facts) in PARTS.items():
        owned = f"m.classid = 'pg_class'::regclass and {relation} = m.objid"
        kinds.append((catalog, facts, owned))
    return [OBJECT.format(catalog=c, facts=facts, condition=on, initial=initial) for c, facts, on in kinds]


def snapshot(connection: Connection, extension: str = "pg_autoembed") -> Snapshot:
    """ValueError where the extension has an object of a kind that is not compared yet."""
    wanted = {"extension": extension, "known": list(MEMBER)}
    with connection.transaction():
        connection.execute("set local search_path = pg_catalog")  # all other names appear with their schema
        if others := connection.execute(OTHERS, wanted).fetchall():
            raise ValueError(f"objects of {others} are not compared")
        ((itself, schema),) = connection.execute(EXTENSION, wanted).fetchall()
        found = {f"extension {extension}": itself}
        for query in objects():
            found.update(connection.execute(query.encode(), wanted).fetchall())
    placed = re.compile(rf'(?<![\w"]){re.escape(schema)}\.')
    return {placed.sub("@extschema@.", name): unplaced(facts, placed) for name, facts in found.items()}


def unplaced(facts: Any, schema: re.Pattern[str]) -> Any:
    if isinstance(facts, str):
        return schema.sub("@extschema@.", facts)
    if isinstance(facts, list):
        return [unplaced(each, schema) for each in facts]
    if isinstance(facts, dict):
        return {schema.sub("@extschema@.", name): unplaced(each, schema) for name, each in facts.items()}
    return facts


def differences(one: Snapshot, other: Snapshot) -> list[str]:
    """The objects that only one of them has, or that are not the same in both."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
