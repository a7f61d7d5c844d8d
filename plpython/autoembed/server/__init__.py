"""The only room that PostgreSQL enters."""
