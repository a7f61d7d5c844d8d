-- Templates: how the text to embed is made of the source columns. `{name}` stands for a column, `{{` and `}}` for
-- braces, \n for the end of a line. A line whose columns are all null is left out.
--
-- A registration keeps the numbers of the source columns in place of their names, so that a renamed column stays.

-- The pieces of a template: a literal, or what stands in braces. An unpaired brace is a piece without either.
create function autoembed.template_pieces(template text, out line bigint, out n bigint, out literal text, out name text)
returns setof record
language sql immutable
begin atomic
    select l.number, p.number,
           case when p.piece[1] in ('{{', '}}') then left(p.piece[1], 1)
                when p.piece[1] !~ '^[{}]' then p.piece[1] end,
           p.piece[2]
    from regexp_split_to_table(template, '\n|\\n') with ordinality as l (line, number)
    cross join lateral regexp_matches(l.line, '(\{\{|\}\}|\{([^{}]*)\}|[^{}]+|[{}])', 'g')
        with ordinality as p (piece, number);
end;

-- The template with the sources' numbers in place of their names; an error where it is none.
create function autoembed.bind_template(relation regclass, sources name[], template text) returns text
language plpgsql stable strict set search_path = pg_catalog, pg_temp as $$
declare
    stranger text;
begin
    if exists (select from autoembed.template_pieces(template) p where p.literal is null and p.name is null) then
        raise exception using errcode = 'invalid_parameter_value',
            message = 'the template has a brace without its other one',
            hint = 'A column is {name}; a brace of the text is {{ or }}.';
    end if;
    select p.name into stranger from autoembed.template_pieces(template) p
        where p.name <> all (sources::text[]) limit 1;
    if stranger is not null then
        raise exception using errcode = 'undefined_column',
            message = format('the template names %s, which is no source column of %s', quote_ident(stranger), relation),
            hint = format('The source columns are: %s.', array_to_string(sources, ', '));
    end if;
    select u.name into stranger from unnest(sources) as u (name)
    where u.name::text not in (select p.name from autoembed.template_pieces(template) p
        where p.name is not null) limit 1;
    if stranger is not null then
        raise exception using errcode = 'invalid_parameter_value',
            message = format('the template does not name source column %I of %s', stranger, relation),
            hint = 'Name each source column in the template, or leave the column out of the sources.';
    end if;
    return (select string_agg(l.text, E'\n' order by l.line)
            from (select p.line, string_agg(
                             case when p.name is not null then format('{%s}', array_position(sources::text[], p.name))
                                  else replace(replace(p.literal, '{', '{{'), '}', '}}') end, '' order by p.n) as text
                  from autoembed.template_lines(template) p group by p.line) l);
end
$$;

-- As template_pieces, and an empty piece for a line that has none.
create function autoembed.template_lines(template text, out line bigint, out n bigint, out literal text, out name text)
returns setof record
language sql immutable
begin atomic
    select l.number, coalesce(p.n, 1), coalesce(p.literal, case when p.name is null then '' end), p.name
    from regexp_split_to_table(template, '\n|\\n') with ordinality as l (line, number)
    left join autoembed.template_pieces(template) p on p.line = l.number;
end;

-- May sql be made of this? A row trigger's arguments can be written by hand.
create function autoembed.is_bound_template(template text, sources integer) returns boolean
language sql immutable
begin atomic
    select coalesce(bool_and(case when p.name is not null
                             then p.name ~ '^[0-9]{1,4}$' and p.name::integer between 1 and sources
                             else p.literal is not null end), false)
    from autoembed.template_pieces(template) p;
end;

-- The template as it was given, for people.
create function autoembed.template_text(template text, sources name[]) returns text
language sql immutable
begin atomic
    select string_agg(l.text, E'\n' order by l.line)
    from (select p.line, string_agg(
                     case when p.name is not null then format('{%s}', sources[p.name::integer])
                          else replace(replace(p.literal, '{', '{{'), '}', '}}') end, '' order by p.n) as text
          from autoembed.template_lines(template) p group by p.line) l;
end;

-- One line over t. Null where all its columns are. Arrays, since a function has a hundred arguments at most.
create function autoembed.template_line(literals text[], columns name[]) returns text
language sql immutable
begin atomic
    select case when bool_or(p.name is not null)
        then format('case when pg_catalog.num_nonnulls(variadic array[%s]) operator(pg_catalog.>) 0
                     then pg_catalog.array_to_string(array[%s], '''') end',
                    string_agg(format('(t.%I)::pg_catalog.text', p.name), ', ' order by p.n)
                        filter (where p.name is not null),
                    string_agg(case when p.name is not null then format('(t.%I)::pg_catalog.text', p.name)
                                    else quote_literal(p.literal) end, ', ' order by p.n))
        else quote_literal(string_agg(p.literal, '')) end
    from unnest(literals, columns) with ordinality as p (literal, name, n);
end;

-- Expression over t: the text to embed. Null where all sources are blank: then there is nothing to embed but the
-- template's own words.
create function autoembed.template_content(template text, sources name[]) returns text
language sql immutable
begin atomic
    select format('case when %s then pg_catalog.array_to_string(array[%s], E''\n'') end',
        (select string_agg(autoembed.has_text(format('(t.%I)::pg_catalog.text', u.name)), ' or ' order by u.n)
         from unnest(sources) with ordinality as u (name, n)),
        (select string_agg(l.text, ', ' order by l.line)
         from (select p.line, autoembed.template_line(array_agg(p.literal order by p.n),
                                                      array_agg(sources[p.name::integer] order by p.n)) as text
               from autoembed.template_lines(template) p group by p.line) l));
end;
