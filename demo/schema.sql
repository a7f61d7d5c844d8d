-- The demo's tables. psql -v dimensions=384 -f demo/schema.sql

create table knowledge_base (
    id             bigint generated always as identity primary key,
    chunk_hash     text not null unique,
    chunk_text     text not null,
    context_header text not null,
    source_file    text not null,
    chunk_index    int  not null,
    total_chunks   int  not null,
    embedding      vector(:dimensions)
);

create table notes (
    id        bigint generated always as identity primary key,
    body      text,
    embedding vector(:dimensions)
);
