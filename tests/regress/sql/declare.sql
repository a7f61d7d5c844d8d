-- Declarations, and those that are refused, with the reason
\set VERBOSITY sqlstate
create table article (id int primary key, title text, body text, embedding vector(16));
select embed_column('article', array['title', 'body'], model => 'stub-16');
select relation, source, target, model, mode, enabled, dimensions, status from embedding_columns;
select embed_column('article', 'body', model => 'stub-16');
select embed_column('article', array['title', 'body'], model => 'stub-16', if_not_exists => true);
select embed_column_set('article', 'embedding', enabled => false);
select target, enabled, status from embedding_columns;
select embed_column_set('article', 'embedding', enabled => true, mode => 'immediate');
select target, mode, status from embedding_columns;
select embed_column_set('article', 'embedding', mode => 'sometimes');

create table no_key (body text, embedding vector(16));
select embed_column('no_key', 'body', model => 'stub-16');
create table other_size (id int primary key, body text, embedding vector(17));
select embed_column('other_size', 'body', model => 'stub-16');
create table no_vector (id int primary key, body text, embedding text);
select embed_column('no_vector', 'body', model => 'stub-16');
create view a_view as select * from article;
select embed_column('a_view', 'body', model => 'stub-16');

alter table article rename to page;
alter table page rename column body to content;
select relation, source, target, status from embedding_columns;
select embed_column_drop('page');
select embed_column_drop('page');
select embed_column('page', 'no_such_column', model => 'stub-16');
drop view a_view;
drop table page, no_key, other_size, no_vector;
