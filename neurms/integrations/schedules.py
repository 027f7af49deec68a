"""Learning-rate schedules by step, for every front end that makes an optimizer by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from neurms.core.ground.errors import check_choice, check_fraction, check_positive_int

__all__ = ["Schedule", "WarmupDecay", "checked_decay"]

Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class WarmupDecay:
    """Factor on the learning rate by step: linear warmup to 1, then a decay to ``min_lr_ratio``.

    With w warmup steps of T and p = (t - w) / (T - w), clipped to [0, 1]:

        t < w       (t + 1) / (w + 1)
        constant    1
        linear      r + (1 - r) (1 - p)
        cosine      r + (1 - r) (1 + cos(pi p)) / 2

    Args:
        schedule: Shape of the decay.
        warmup_steps: w.
        total_steps: T; not read by ``"constant"``.
        min_lr_ratio: r, the least factor after the warmup.

    Example:
        >>> factor = WarmupDecay("linear", warmup_steps=1, total_steps=5)
        >>> [factor(step) for step in range(6)]
        [0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    """

    schedule: Schedule
    warmup_steps: int = 0
    total_steps: int = 1
    min_lr_ratio: float = 0.0

    def __call__(self, step: int) -> float:
        """Return the factor for optimizer step ``step``, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.schedule == "constant":
            return 1.0
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        left = 1.0 - min(1.0, progress)
        if self.schedule == "cosine":
            left = 0.5 * (1.0 - math.cos(math.pi * left))
        return self.min_lr_ratio + (1.0 - self.min_lr_ratio) * left


def checked_decay(
    schedule: Schedule | None,
    warmup_steps: int,
    total_steps: int | None,
    min_lr_ratio: float,
    *,
    estimate: Callable[[], int],
    cure: str,
) -> WarmupDecay | None:
    """Return the factor that a front end's arguments ask for, None for ``schedule=None``.

    Args:
        schedule: As for :class:`WarmupDecay`, or None.
        warmup_steps: As there.
        total_steps: As there; None asks ``estimate`` where the shape needs a number.
        min_lr_ratio: As there.
        estimate: Returns the number of steps, or raises a ValueError that says why it cannot.
        cure: What to do about a bad ``total_steps``.

    Raises:
        ValueError: An argument is out of its range; a warmup without a schedule, or longer than
            the run.
        TypeError: An argument is of the wrong type.
    """
    check_choice("schedule", schedule, (None, "constant", "linear", "cosine"))
    check_positive_int("warmup_steps", warmup_steps, low=0)
    check_fraction("min_lr_ratio", min_lr_ratio, closed=True)
    if total_steps is not None:
        check_positive_int("total_steps", total_steps, cure=cure)
    if schedule is None:
        if warmup_steps:
            raise ValueError(
                f"warmup_steps={warmup_steps!r} needs a schedule; pass schedule='constant' to "
                "warm up and then keep the learning rate"
            )
        return None
    if schedule == "constant" and total_steps is None:
        return WarmupDecay(schedule, warmup_steps)
    total = estimate() if total_steps is None else total_steps
    if warmup_steps > total:
        raise ValueError(
            f"warmup_steps={warmup_steps!r} is longer than the run of total_steps={total!r}; lower "
            "it, or train longer"
        )
    return WarmupDecay(schedule, warmup_steps, total, float(min_lr_ratio))
