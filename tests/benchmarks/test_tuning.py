import math

import pytest

from benchmarks.tuning import tune


def searched(peak: float, centre: float, trials: int = 7) -> tuple[float, list[float]]:
    """Search a parabola in log lr and return the best and all rates tried."""
    tried: list[float] = []

    def objective(lr: float) -> float:
        tried.append(lr)
        return -(math.log(lr / peak) ** 2)

    return tune(objective, centre, trials=trials), tried


def test_finds_a_peak_within_the_first_bracket() -> None:
    best, tried = searched(peak=0.012, centre=0.01)
    assert tried[:3] == [0.01, 0.03, 0.00333]
    assert 0.006 < best < 0.024
    assert len(tried) == 7


@pytest.mark.parametrize("peak", [0.3, 3e-4])
def test_walks_outward_to_a_peak_far_away(peak: float) -> None:
    best, _ = searched(peak, centre=0.01, trials=8)
    assert peak / 3 <= best <= 3 * peak


def test_refinement_halves_the_step() -> None:
    tried: list[float] = []
    best = tune(
        lambda lr: tried.append(lr) or -(math.log(lr / 0.0173) ** 2), 0.01, trials=3, refine=2
    )
    # Below .0173 lies .01, which the bracket has: the second step is a shorter one.
    assert tried[3:] == [0.0173, 0.0131]
    assert best == 0.0173


def test_no_rate_is_tried_twice() -> None:
    for peak in (1e-3, 0.004, 0.0173, 0.05):
        tried: list[float] = []
        tune(lambda lr: tried.append(lr) or -(math.log(lr / peak) ** 2), 0.01, trials=6, refine=2)  # noqa: B023
        assert len(set(tried)) == len(tried) == 8


def test_is_the_same_every_time() -> None:
    assert searched(0.02, 0.01) == searched(0.02, 0.01)


def test_divergence_is_worst() -> None:
    assert tune(lambda lr: math.nan if lr > 0.005 else 0.5, 0.01, trials=4) < 0.005


def test_too_few_trials_are_refused() -> None:
    with pytest.raises(ValueError, match="trials=2"):
        tune(lambda lr: lr, 0.01, trials=2)
