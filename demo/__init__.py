"""The demo: the PostgreSQL manual, cut into chunks, embedded and searched inside the server."""
