"""One collective call, as it is predicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Exchange"]


@dataclass(frozen=True)
class Exchange:
    """One collective call: its kind, its bytes, and what for.

    Bytes are those of the buffer that is reduced or broadcast, of the whole that is gathered, and
    of what this rank gives to an all-to-all.
    """

    kind: Literal["all-reduce", "all-gather", "all-to-all", "broadcast"]
    bytes: int
    purpose: str
