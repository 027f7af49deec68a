"""What a training logged beside its profile: losses and metrics, sorted for people."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TypeAlias

from neurms.report.formats import number

__all__ = ["TRAIN_LOSS", "Curves", "curve_groups", "diverged_at", "loss_texts"]

Curves: TypeAlias = Mapping[str, Sequence[tuple[float, float]]]
"""Name -> points of (step, value)."""

TRAIN_LOSS = "train loss"
"""Name of the loss that a profiler collects by itself."""

_SPLIT = re.compile(r"^([AB]: )?(train(ing)?|val(id(ation)?)?|eval|test)[ _/.-]|[_/](step|epoch)$")
_RUN = re.compile(r"^[AB]: ")
"""What two runs' curves begin with in one plot."""
_END = 0.1
"""Share of a training's points whose mean is how it ended: single batches scatter."""


def curve_groups(logged: Curves) -> dict[str, dict[str, Sequence[tuple[float, float]]]]:
    """Return curves by what they show, losses first: a training's beside its validation's.

    Args:
        logged: All curves.

    Example:
        >>> found = curve_groups({"val_acc": [(1, 0.5)], "train loss": [], "val_loss": [(1, 2.0)]})
        >>> {what: list(curves) for what, curves in found.items()}
        {'loss': ['val_loss'], 'acc': ['val_acc']}
    """
    groups: dict[str, dict[str, Sequence[tuple[float, float]]]] = {}
    for name, points in logged.items():
        shown = [(step, value) for step, value in points if math.isfinite(value)]
        if shown:
            what = _RUN.sub("", _SPLIT.sub("", name)) or name
            groups.setdefault(what, {})[name] = shown
    return dict(sorted(groups.items(), key=lambda group: not _is_loss(group[0])))


def loss_texts(logged: Curves) -> dict[str, str]:
    """Return how each loss went: its first value, and its last or for batches the mean of the last.

    Example:
        >>> loss_texts({"val_loss": [(10, 2.3), (20, 0.5)], "acc": [(10, 0.4)]})
        {'val_loss': '2.3 → 0.5'}
    """
    found = {}
    for name, points in logged.items():
        if _is_loss(name) and points:
            ends = [number(points[0][1])] if len(points) > 1 else []
            last = points[-max(1, int(_END * len(points))) if name == TRAIN_LOSS else -1 :]
            found[name] = " → ".join([*ends, _ending(fmean(value for _, value in last))])
    return found


def diverged_at(logged: Curves) -> int | None:
    """Return the first step at which a loss was NaN or infinite, None if none was."""
    steps = [
        int(step)
        for name, points in logged.items()
        for step, value in points
        if _is_loss(name) and not math.isfinite(value)
    ]
    return min(steps, default=None)


def _ending(value: float) -> str:
    return "NaN" if math.isnan(value) else number(value)


def _is_loss(name: str) -> bool:
    return "loss" in name.lower()
