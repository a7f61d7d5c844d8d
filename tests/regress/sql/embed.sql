-- One text, many texts, and what there is no vector for
\set VERBOSITY sqlstate
select vector_dims(embed('a text')), vector_dims(embed('a text', 'stub-16'));
select embed('a text') = embed('a text') as same, embed('a text') = embed('another') as others,
       embed('a text', prompt => 'query') = embed('query: a text') as prompted;
select embed(null::text) is null as null_stays_null, embed(array[]::text[]);
select v = embed(t) as in_order
from unnest(embed(array['one', 'two', null, 'one'])) with ordinality e (v, i)
join unnest(array['one', 'two', null, 'one']) with ordinality x (t, i) using (i) order by i;
select embed('a text', 'no-such-model');
select embed('a text', prompt => 'no-such-prompt');
select embed('a raiseword text') is null;
-- without torch
do $$ import sys; assert "torch" not in sys.modules $$ language plpython3u;
select embed_unload();
