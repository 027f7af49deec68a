"""Optional dependencies: a missing one is an error that says how to get it."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

__all__ = ["require"]


def require(package: str, *, extra: str) -> ModuleType:
    """Import a package that one of the extras installs.

    Args:
        package: Name to import.
        extra: Extra of this distribution that brings it.

    Returns:
        The package.

    Raises:
        ImportError: It is not installed.
        ModuleNotFoundError: It is there and does not find something itself, which no installation
            of the extra would cure.

    Example:
        >>> require("torch", extra="all").__name__
        'torch'
    """
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package.partition(".")[0]:
            raise
        raise ImportError(
            f"this part of neurms needs {package}, which is not installed; "
            f'pip install "neurms[{extra}]"',
            name=package,
        ) from error
