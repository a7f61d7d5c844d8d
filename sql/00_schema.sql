-- The interface goes into the schema that the extension is installed in; state and inner functions live here.
create schema autoembed;

comment on schema autoembed is
    'Holds the state and the inner functions of pg_autoembed; the interface is in the schema of the extension.';
