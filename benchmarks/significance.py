"""How sure a comparison is: paired tests, corrected for their number, and confidence bands."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

__all__ = ["band", "below", "compared", "equivalent", "holm", "paired", "spread"]

RESAMPLES = 10_000


def paired(first: Sequence[float], second: Sequence[float]) -> dict[str, float]:
    """Return the mean difference of two equally seeded series and its paired t-test's p value."""
    from scipy.stats import ttest_rel

    difference = sum(a - b for a, b in zip(first, second, strict=True)) / len(first)
    p = float(ttest_rel(first, second).pvalue) if len(first) > 1 else float("nan")
    return {"difference": difference, "p": p}


def equivalent(first: Sequence[float], second: Sequence[float], margin: float) -> dict[str, float]:
    """Return the mean difference of two equally seeded series and the p value of TOST.

    Two one-sided paired t-tests against ``-margin`` and ``margin``; the larger p counts. A small
    one says that the series differ by less than the margin; a large one says nothing.
    """
    over, under = below(first, second, margin), below(second, first, margin)
    return {"difference": over["difference"], "p": max(over["p"], under["p"])}


def below(first: Sequence[float], second: Sequence[float], margin: float) -> dict[str, float]:
    """Return the mean difference of two equally seeded series and the p value of its being small.

    One one-sided paired t-test: a small p says that ``first`` is less than ``second + margin``.
    """
    from scipy.stats import ttest_rel

    if not margin > 0:
        raise ValueError(f"margin={margin!r} must be positive: it says what counts as level")
    pairs = list(zip(first, second, strict=True))
    difference = sum(a - b for a, b in pairs) / len(pairs)
    if len(pairs) < 2:
        return {"difference": difference, "p": float("nan")}
    raised = [b + margin for _, b in pairs]
    return {
        "difference": difference,
        "p": float(ttest_rel(first, raised, alternative="less").pvalue),
    }


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values adjusted for their number by Holm's step-down rule, in their own order.

    NaN, the p value of a test that could not be made, counts as 1.
    """
    p_values = [1.0 if p != p else p for p in p_values]
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
    """Return mean and standard deviation, the latter NaN for one figure, both NaN with a NaN."""
    if any(figure != figure for figure in series):
        return float("nan"), float("nan")
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
