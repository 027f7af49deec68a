"""The law share ~ width^k: k and its confidence interval, by least squares in logarithms."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

__all__ = ["exponent"]

Run = Mapping[str, Any]


def exponent(
    runs: Iterable[Run], key: str, series: Callable[[Run], Hashable] = lambda run: None
) -> dict[str, float] | None:
    """Fit one exponent of ``width`` to several series, each with a constant of its own.

    Args:
        runs: Each with a ``width`` and a positive number under ``key``.
        key: What falls with the width.
        series: Which runs share a constant, such as those of one batch size.

    Returns:
        ``k``; ``low`` and ``high``, its 95 % confidence interval by Student's t; ``runs``, their
        number; None where the runs do not determine it.

    Example:
        >>> found = exponent([{"width": w, "y": 3 / w} for w in (1, 2, 4, 8)], "y")
        >>> round(found["k"], 9)
        -1.0
    """
    from scipy.stats import t

    groups: dict[Hashable, list[tuple[float, float]]] = defaultdict(list)
    for run in runs:
        groups[series(run)].append((math.log(run["width"]), math.log(run[key])))
    centred = [point for group in groups.values() for point in _centred(group)]
    spread = sum(x * x for x, _ in centred)
    freedom = len(centred) - len(groups) - 1
    if not spread or freedom < 1:
        return None
    k = sum(x * y for x, y in centred) / spread
    rest = sum((y - k * x) ** 2 for x, y in centred)
    half = float(t.ppf(0.975, freedom)) * math.sqrt(rest / freedom / spread)
    return {"k": k, "low": k - half, "high": k + half, "runs": len(centred)}


def _centred(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    x = sum(p[0] for p in points) / len(points)
    y = sum(p[1] for p in points) / len(points)
    return [(a - x, b - y) for a, b in points]
