"""Validation curves of a comparison's rows, as the mean over their seeds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from benchmarks.evidence.ledger import Row
from benchmarks.significance import spread

__all__ = ["curve", "reached"]

Curve = Sequence[tuple[float, float]]


def curve(row: Row) -> list[tuple[int, float]]:
    """Return a row's validation loss by step, the mean over its seeds."""
    runs = row.reported.get(row.chosen, {}).values()
    by_step: dict[int, list[float]] = {}
    for run in runs:
        for step, loss in run.get("curve", ()):
            by_step.setdefault(step, []).append(loss)
    # A run that diverged has no curve: its row has no mean over all seeds.
    return [(step, spread(own)[0]) for step, own in by_step.items() if len(own) == len(runs)]


def reached(own: Curve, other: Curve) -> float | None:
    """Return after which share of another curve's steps one has its last loss.

    Between points a curve is straight.

    Returns:
        None where it never has, has it from the first point on, or has no points.

    Example:
        >>> reached([(10, 3.0), (20, 2.0), (40, 1.0)], [(20, 3.0), (40, 2.5)])
        0.375
    """
    if not own or not other:
        return None
    steps, goal = other[-1]
    for (x1, y1), (x2, y2) in pairwise(own):
        if y1 > goal >= y2:
            return (x1 + (x2 - x1) * (y1 - goal) / (y1 - y2)) / steps
    return None
