-- Nearest rows, with and without the index
\set VERBOSITY sqlstate
create table chapter (id int primary key, book text, body text, embedding vector(16));
insert into chapter select g, 'book ' || g % 3, 'chapter ' || g from generate_series(1, 60) g;
select embed_column('chapter', 'body', model => 'stub-16');
call embed_pending() \gset
select count(*), bool_and(s.distance >= s.before) as nearest_first, bool_and(s.content = c.body) as own_text,
       bool_and(abs(s.distance - (c.embedding <=> embed('a query', 'stub-16', 'query'))) < 1e-6) as own_distance
from (select *, lag(distance) over () as before from embed_search('chapter', 'a query', k => 5)) s
join chapter c on c.id = (s.key ->> 'id')::int;
select count(*) as found, count(*) filter (where c.book = 'book 1') as of_the_book
from embed_search('chapter', 'a query', k => 100, filter => '{"book": "book 1"}') s join chapter c on c.id = (s.key ->> 'id')::int;
select embed_index('chapter');
select embed_index('chapter');
select indexdef ~ 'hnsw .*vector_cosine_ops' as hnsw from pg_indexes where tablename = 'chapter' and indexdef ~ 'hnsw';
select count(*) from embed_search('chapter', 'a query', k => 5);
select * from embed_search('chapter', 'a query', k => 0);
select * from embed_search('chapter', 'a query', filter => '{"no_such_column": 1}');
drop table chapter;
