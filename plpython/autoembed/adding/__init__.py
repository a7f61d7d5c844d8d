"""A published folder becomes a model. Never inside a server."""
