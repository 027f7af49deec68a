"""Transforms beside the structures: momentum, safeguards, factors of the shape."""
