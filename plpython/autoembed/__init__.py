"""Embeddings inside PostgreSQL: the package that the extension's SQL functions call."""

__version__ = "0.1.0"

# Each SQL body passes the version it was written for; the session compares the two.
API_VERSION = 1
