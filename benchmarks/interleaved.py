"""Timing side by side: contenders take turns, so that a drift of the machine hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

Turn = Callable[[int], Callable[[], Any]]
"""Given a round, prepares fresh data outside the clock and returns what is timed."""


def interleaved(
    contenders: Mapping[str, Turn], baseline: str, *, rounds: int, warmup: int = 3
) -> dict[str, dict[str, float]]:
    """Time every contender once a round, in an order that turns around.

    Args:
        contenders: Turns by name.
        baseline: The name that ratios are against.
        rounds: Counted rounds.
        warmup: Rounds before them.

    Returns:
        By name: ``ms``, the median; ``ratio``, the median over rounds of the time against the
        baseline's in the same round; ``low`` and ``high``, that ratio's quartiles.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + warmup):
        names = list(contenders) if number % 2 else list(contenders)[::-1]
        for name in names:
            timed = contenders[name](number)
            start = time.perf_counter()
            timed()
            spent = time.perf_counter() - start
            if number >= warmup:
                times[name].append(spent)
    result = {}
    for name, own in times.items():
        ratios = [a / b for a, b in zip(own, times[baseline], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        result[name] = {
            "ms": 1e3 * statistics.median(own),
            "ratio": middle,
            "low": low,
            "high": high,
        }
    return result


def shown(result: Mapping[str, Mapping[str, float]]) -> str:
    """Return the result as lines of text."""
    return "\n".join(
        f"  {name:24}{row['ms']:9.3f} ms   x{row['ratio']:.3f}"
        f"  ({row['low']:.3f} .. {row['high']:.3f})"
        for name, row in result.items()
    )
