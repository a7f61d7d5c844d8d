"""Texts to checked vectors, whichever encoder runs."""
