"""The release, in the one place that says it: the build, the note in a state dict and users ask."""

__all__ = ["__version__"]

__version__ = "0.1.0"
