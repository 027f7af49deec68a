"""The error that a wrong command line ends in."""

from __future__ import annotations

from neurms.core.ground.errors import NeurmsError

__all__ = ["UsageError"]


class UsageError(NeurmsError, ValueError):
    """What was asked for cannot be done; the message says what can."""
