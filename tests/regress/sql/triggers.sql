-- A row never carries another text's vector
\set VERBOSITY sqlstate
create table note (id int primary key, body text, other text, embedding vector(16));
insert into note values (1, 'one'), (2, 'two');
select embed_column('note', 'body', model => 'stub-16');
call embed_pending() \gset
update note set other = 'nothing to the text' where id = 1;
update note set body = 'a new text' where id = 2;
select id, embedding is not null as filled from note order by id;
update note set body = 'one again', embedding = embed('something else', 'stub-16') where id = 1;
select id, embedding is not null as filled from note order by id;
call embed_pending() \gset
select id, embedding = embed(body, 'stub-16', 'document') as own from note order by id;

select embed_column_set('note', 'embedding', mode => 'immediate');
insert into note values (3, 'at once'), (4, null);
update note set body = 'at once, too' where id = 1;
select id, embedding = embed(body, 'stub-16', 'document') as own from note order by id;
-- a model that fails keeps no writer from writing
insert into note values (5, 'a raiseword text');
select id, embedding is not null as filled from note order by id;
drop table note;
