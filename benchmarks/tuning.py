"""The search for a learning rate: the same number of trials for every optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable

import optuna

__all__ = ["tune"]

FACTOR = 3.0
NEAR = 0.05
"""How little two rates may differ to count as one, when trials refine."""


def tune(
    objective: Callable[[float], float], centre: float, *, trials: int, refine: int = 0
) -> float:
    """Return the learning rate with the highest objective.

    The centre and its neighbours at a factor of three come first; while the best lies at an edge,
    the next value outside is tried; the rest is optuna's TPE within a factor of three of the best,
    and ``refine`` more trials lie a factor of sqrt(3) above and below the best so far, in turn, or
    half as far where that was tried before. No value is tried twice, so that equal numbers of
    trials are equally many values. The seed is fixed: the same objective gives the same trials.

    Args:
        objective: Of a learning rate rounded to three digits; NaN and infinities count as worst.
        centre: Where to start.
        trials: How many values are tried by bracketing and TPE, 3 or more.
        refine: How many more.
    """
    if trials < 3:
        raise ValueError(f"trials={trials} must be 3 or more: a centre and its neighbours")
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        sampler = optuna.samplers.TPESampler(seed=0, n_startup_trials=3)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        tried: dict[float, float] = {}
        while len(tried) < trials:
            lr = _next(tried, centre)
            low, high = (lr, lr) if lr is not None else _around(tried)
            space = optuna.distributions.FloatDistribution(low, high, log=True)
            trial = study.ask({"lr": space})
            chosen = float(f"{trial.params['lr']:.3g}")
            value = objective(chosen)
            tried[chosen] = value if math.isfinite(value) else -math.inf
            study.tell(trial, max(tried[chosen], -1e30))
    finally:
        optuna.logging.set_verbosity(verbosity)
    for number in range(refine):
        chosen = _between(tried, upward=number % 2 == 0)
        value = objective(chosen)
        tried[chosen] = value if math.isfinite(value) else -math.inf
    return max(tried, key=tried.__getitem__)


def _next(tried: dict[float, float], centre: float) -> float | None:
    """Return the value that the bracket still needs, None once the best lies inside."""
    for start in (centre, centre * FACTOR, centre / FACTOR):
        if float(f"{start:.3g}") not in tried:
            return start
    best = max(tried, key=tried.__getitem__)
    if best == max(tried):
        return best * FACTOR
    return best / FACTOR if best == min(tried) else None


def _around(tried: dict[float, float]) -> tuple[float, float]:
    best = max(tried, key=tried.__getitem__)
    return best / FACTOR, best * FACTOR


def _between(tried: dict[float, float], *, upward: bool) -> float:
    """Return a value near the best that was not tried, above it rather than below or the reverse.

    Steps shrink from sqrt(3): what differs by less than a twentieth counts as tried.
    """
    best, power = max(tried, key=tried.__getitem__), 0.5
    while True:
        for sign in (1, -1) if upward else (-1, 1):
            chosen = float(f"{best * FACTOR ** (sign * power):.3g}")
            if all(abs(chosen / known - 1) > NEAR for known in tried):
                return chosen
        power /= 2
        if FACTOR**power < 1 + 2 * NEAR:
            return chosen
