"""Which steps of a training are looked at."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

from neurms.core.ground.errors import check_positive_int

__all__ = ["Look", "Schedule"]

Look: TypeAlias = Literal["statistics", "times"]
"""What a step is looked at for; with ``every_n_steps=1`` statistics come with their own times."""


class Schedule:
    """Statistics at every n-th step; times at the step before, which no statistics disturb.

    Args:
        every_n_steps: Distance between two steps with statistics.
        warmup_steps: Steps before the first of them.

    Raises:
        ValueError: One of them is out of its range.

    Example:
        >>> schedule = Schedule(every_n_steps=3, warmup_steps=1)
        >>> schedule.start(0)
        >>> [schedule.look(step) for step in range(5)]
        ['times', 'statistics', None, 'times', 'statistics']
    """

    def __init__(self, every_n_steps: int, warmup_steps: int) -> None:
        self.every_n_steps = check_positive_int("every_n_steps", every_n_steps)
        self.warmup_steps = check_positive_int("warmup_steps", warmup_steps, low=0)
        self.wake_at = 0
        """The next step that is looked at for anything."""
        self._due_at = 0

    def start(self, step: int) -> None:
        """Begin at ``step``, which has not been asked for yet."""
        self._due_at = self.due_after(step)
        self.wake_at = self._due_at - (self.every_n_steps > 1 and step < self._due_at)

    def look(self, step: int) -> Look | None:
        """Return what ``step``, which begins now, is looked at for, and plan the next look."""
        found: Look | None = None
        if step >= self._due_at:
            self._due_at = self.due_after(step + 1)
            found = "statistics"
        elif step == self.wake_at:
            found = "times"
        self.wake_at = self._due_at - (self.every_n_steps > 1 and step + 1 < self._due_at)
        return found

    def due_after(self, step: int) -> int:
        """Return the first step from ``step`` on that is to have statistics."""
        rounds = math.ceil(max(step - self.warmup_steps, 0) / self.every_n_steps)
        return self.warmup_steps + rounds * self.every_n_steps
