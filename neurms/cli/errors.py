"""The error that a wrong command line ends in."""

from __future__ import annotations

from pathlib import Path

from neurms.core.ground.errors import NeurmsError

__all__ = ["UsageError", "check_folder"]


class UsageError(NeurmsError, ValueError):
    """What was asked for cannot be done; the message says what can."""


def check_folder(option: str, path: Path | None) -> None:
    """Raise unless a file can be written where an option says: into a folder that is there.

    Raises:
        UsageError: There is no such folder.
    """
    if path is not None and not path.absolute().parent.is_dir():
        raise UsageError(f"{option} {path}: its folder does not exist; create it first")
