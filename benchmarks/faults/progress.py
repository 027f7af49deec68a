"""A note in shared memory of what a process is doing, readable after it was killed."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

PHASES = ("start", "forward", "backward", "step", "between", "save", "end")
_FORM = struct.Struct("<ii")


class Progress:
    """Phase and step of a run.

    Args:
        path: The file that holds the note; made if it is missing.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            path.write_bytes(_FORM.pack(0, -1))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _FORM.size)

    def now(self, phase: str, step: int) -> None:
        """Note what begins."""
        self._memory[:] = _FORM.pack(PHASES.index(phase), step)

    def read(self) -> tuple[str, int]:
        """Return phase and step."""
        phase, step = _FORM.unpack(self._memory[:])
        return PHASES[phase], step
