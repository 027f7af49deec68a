"""The search that every method gets: equally many different trials, one axis after the other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

from benchmarks.evidence.space import FINENESS, Point, Space

__all__ = ["search"]

Tried = dict[Point, float]


def search(space: Space, loss_at: Callable[[dict[str, float]], float], trials: int) -> Point:
    """Return the point with the lowest loss after so many different trials.

    From the best point the search looks at both neighbours on one axis, moves on while it gets
    better, and goes to the next axis, until no neighbour is better. Then rates take smaller steps,
    and at last the points around the best are tried in the order of their distance. The same
    losses lead to the same trials, so that an interrupted search goes on where it stopped.

    Args:
        space: What may be tried.
        loss_at: Of the settings at a point; what is not finite counts as worst.
        trials: How many points are tried.
    """
    if trials < 1:
        raise ValueError(f"trials={trials} must be 1 or more")
    tried: Tried = {}
    for point in _walk(space, tried):
        loss = loss_at(space.values(point))
        tried[point] = loss if math.isfinite(loss) else math.inf
        if len(tried) == trials:
            break
    return _best(tried)


def _walk(space: Space, tried: Tried) -> Iterator[Point]:
    yield space.origin
    stride = FINENESS
    while stride:
        yield from _descend(space, tried, stride)
        stride //= 2
    for distance in itertools.count(1):
        yield from _shell(space, tried, distance)


def _descend(space: Space, tried: Tried, stride: int) -> Iterator[Point]:
    calm = 0
    for axis in itertools.cycle(range(len(space.axes))):
        if calm == len(space.axes):
            return
        before = _best(tried)
        yield from _bracket(space, tried, axis, stride)
        # An axis that has just been moved along is bracketed at its new best.
        calm = calm + 1 if _best(tried) == before else 1


def _bracket(space: Space, tried: Tried, axis: int, stride: int) -> Iterator[Point]:
    while True:
        around = [space.moved(_best(tried), axis, sign, stride) for sign in (1, -1)]
        missing = [point for point in around if point is not None and point not in tried]
        if not missing:
            return
        yield missing[0]


def _shell(space: Space, tried: Tried, distance: int) -> Iterator[Point]:
    """Yield what is left within so many finest steps of the best, the nearest first."""
    best, span = _best(tried), range(-distance, distance + 1)
    offsets = itertools.product(span, repeat=len(best))
    for offset in sorted(offsets, key=lambda o: sum(map(abs, o))):
        point = tuple(b + o for b, o in zip(best, offset, strict=True))
        if point not in tried and _inside(space, point):
            yield point


def _inside(space: Space, point: Point) -> bool:
    return all(
        not axis.choices or 0 <= index < len(axis.choices)
        for axis, index in zip(space.axes.values(), point, strict=True)
    )


def _best(tried: Tried) -> Point:
    return min(tried, key=tried.__getitem__)
