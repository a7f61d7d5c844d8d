"""Which rows are next, in what order, and what each error means. It knows no plpy."""
