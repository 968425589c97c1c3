"""Looks at trained models: a table of their parts, sentence vectors, attention maps."""
