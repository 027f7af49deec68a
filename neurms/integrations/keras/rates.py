"""The learning rate that ``fallback_lr`` goes with: a number itself, a schedule's peak."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import keras

from neurms.core.ground.errors import check_real

__all__ = ["base_rate", "peak_of"]

_HORIZON = 2**24
"""Steps that are looked at; float32 counts no further."""
_RATIO = 1.05
_RISE = 1e-3


def base_rate(learning_rate: Any, given: float | None, default: float) -> float:
    """Return the learning rate that ``fallback_lr`` goes with.

    Args:
        learning_rate: A number; a callable, whose present value counts; or a schedule, whose peak
            does.
        given: What the user says instead, or None.
        default: What stands for a number that is 0.

    Raises:
        ValueError: A schedule has no peak; ``given`` is not positive.
    """
    if given is not None:
        return check_real("base_learning_rate", given, strict=True)
    if isinstance(learning_rate, keras.optimizers.schedules.LearningRateSchedule):
        return peak_of(learning_rate)
    # Keras has seen to it that nothing else than a callable gets here.
    return float(learning_rate() if callable(learning_rate) else learning_rate) or default


def peak_of(schedule: Any) -> float:
    """Return the greatest rate of a schedule.

    It is sampled at steps 0, 1, 2, ... that grow by a twentieth each, up to 2^24, and around every
    number of steps among its own attributes (``warmup_steps``, ``decay_steps``, ``boundaries``);
    from the greatest of these it climbs, so that a peak between two samples is found too. A
    schedule that fails beyond some step (a table that ends) is taken up to there.

    Args:
        schedule: A Keras ``LearningRateSchedule``, built in or one's own.

    Raises:
        ValueError: It still rises in the last half of these steps, or is 0 everywhere.

    Example:
        >>> peak_of(
        ...     keras.optimizers.schedules.CosineDecay(0.0, 90, warmup_target=0.5, warmup_steps=10)
        ... )
        0.5
    """  # noqa: DOC501  (a ValueError, made below)
    rates: dict[int, float] = {}

    def rate(step: int) -> float:
        if step not in rates:
            rates[step] = _rate(schedule, step)
        return rates[step]

    grid = sorted({*_grid(), *_hints(schedule)})
    best = _climbed(max(grid, key=rate), rate)
    peak, early = rates[best], max(rate(step) for step in grid if step <= _HORIZON // 2)
    if not 0.0 < peak < math.inf:
        raise _unknown(schedule, f"found no rate above 0 (its rate at step 0 is {rate(0)!r})")
    if best > _HORIZON // 2 and peak > (1.0 + _RISE) * early:
        raise _unknown(schedule, f"which still rises after {_HORIZON // 2} steps")
    return peak


def _rate(schedule: Any, step: int) -> float:
    """Return the rate at a step, minus infinity where the schedule has none."""
    try:
        rate = float(schedule(step))
    except Exception:
        # What a schedule of the user's raises beyond its end is its own affair.
        if step == 0:
            raise
        return -math.inf
    return rate if math.isfinite(rate) else -math.inf


def _grid() -> Iterator[int]:
    step = 0
    while step < _HORIZON:
        yield step
        step = max(step + 1, int(step * _RATIO))
    yield _HORIZON


def _hints(schedule: Any) -> Iterator[int]:
    """Yield steps at which the schedule's own attributes say that something changes."""
    numbers = [n for value in vars(schedule).values() for n in _numbers(value)]
    # One span after another: a warm-up, then a decay.
    for first in numbers:
        for second in (0, *numbers[:8]):
            turn = int(first + second)
            yield from (s for s in (turn - 1, turn, turn + 1) if 0 <= s <= _HORIZON)


def _numbers(value: Any, most: int = 32) -> Iterator[float]:
    if isinstance(value, (list, tuple)):
        for part in value[:most]:
            yield from _numbers(part, 0)
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and 1 <= value < _HORIZON:
        yield value


def _climbed(step: int, rate: Callable[[int], float]) -> int:
    """Return the top of the slope that ``step`` stands on, by strides that halve."""
    stride = max(1, int(step * (_RATIO - 1.0)))
    while stride:
        around = [s for s in (step, step - stride, step + stride) if 0 <= s <= _HORIZON]
        higher = max(around, key=rate)
        if higher == step:
            stride //= 2
        step = higher
    return step


def _unknown(schedule: Any, why: str) -> ValueError:
    return ValueError(
        f"learning_rate={type(schedule).__name__}, {why}, has no peak for fallback_lr to go with; "
        "pass base_learning_rate=RATE, at which AdamW's parameters get fallback_lr"
    )
