"""How sure a comparison is: paired tests, corrected for their number, and confidence bands."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

__all__ = ["band", "compared", "holm", "paired", "spread"]

RESAMPLES = 10_000


def paired(first: Sequence[float], second: Sequence[float]) -> dict[str, float]:
    """Return the mean difference of two equally seeded series and its paired t-test's p value."""
    from scipy.stats import ttest_rel

    difference = sum(a - b for a, b in zip(first, second, strict=True)) / len(first)
    p = float(ttest_rel(first, second).pvalue) if len(first) > 1 else float("nan")
    return {"difference": difference, "p": p}


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values adjusted for their number by Holm's step-down rule, in their own order."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, floor = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        floor = max(floor, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = floor
    return adjusted


def compared(
    own: Sequence[float], others: Mapping[str, Sequence[float]]
) -> dict[str, dict[str, float]]:
    """Return the paired comparison of one series with each other one.

    Args:
        own: A figure for each seed.
        others: The same for the others, by name.

    Returns:
        By name: ``difference`` (own less other), ``p`` and ``p_holm``, corrected for the number of
        comparisons.
    """
    tests = {name: paired(own, series) for name, series in others.items()}
    corrected = holm([test["p"] for test in tests.values()])
    return {
        name: {**test, "p_holm": p}
        for (name, test), p in zip(tests.items(), corrected, strict=True)
    }


def spread(series: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard deviation, the latter NaN for one figure."""
    deviation = statistics.stdev(series) if len(series) > 1 else float("nan")
    return statistics.fmean(series), deviation


def band(series: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Return the bootstrap confidence band of a mean (percentiles, a fixed seed)."""
    import numpy as np

    if len(series) < 2:
        return float("nan"), float("nan")
    generator = np.random.default_rng(0)
    draws = generator.choice(np.asarray(series), (RESAMPLES, len(series))).mean(1)
    tail = 50 * (1 - level)
    low, high = np.percentile(draws, (tail, 100 - tail))
    return float(low), float(high)
