"""The search: equally many different trials, found minima, no edge that goes unnoticed."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.evidence.search import search
from benchmarks.evidence.space import Axis, Space, levels, rate


def space(start: float = 1e-3) -> Space:
    return Space({"lr": rate(start), "momentum": levels(0.5, 0.0, 0.5, 0.8, 0.9)})


def logged(trials: int, bowl: tuple[float, float], start: float = 1e-3) -> tuple[list, dict]:
    seen: list[dict[str, float]] = []

    def loss_at(values: dict[str, float]) -> float:
        seen.append(values)
        return math.log(values["lr"] / bowl[0]) ** 2 + (values["momentum"] - bowl[1]) ** 2

    made = space(start)
    return seen, made.values(search(made, loss_at, trials))


@given(
    trials=st.integers(1, 60),
    lr=st.floats(1e-6, 1e2),
    momentum=st.sampled_from((0.0, 0.5, 0.8, 0.9)),
)
def test_every_trial_differs_and_their_number_is_the_budget(
    trials: int, lr: float, momentum: float
) -> None:
    seen, _ = logged(trials, (lr, momentum))
    assert len(seen) == trials
    assert len({tuple(values.items()) for values in seen}) == trials


@pytest.mark.parametrize(("lr", "momentum"), [(0.05, 0.9), (2e-5, 0.0), (1.1e-3, 0.5)])
def test_a_bowl_far_from_the_start_is_found_to_the_lattice(lr: float, momentum: float) -> None:
    _, best = logged(24, (lr, momentum))
    assert best["momentum"] == momentum
    assert abs(math.log2(best["lr"] / lr)) <= 0.13


def test_rates_go_on_as_long_as_the_best_is_outermost() -> None:
    seen, best = logged(12, (1e9, 0.5))
    assert best["lr"] == max(values["lr"] for values in seen)
    assert best["lr"] == pytest.approx(1e-3 * 2 ** (12 - 1), rel=0.01)


def test_a_diverged_trial_counts_as_worst_and_uses_the_budget() -> None:
    tried = []

    def loss_at(values: dict[str, float]) -> float:
        tried.append(values)
        return math.nan if values["lr"] > 2e-3 else values["lr"]

    best = space().values(search(space(start=4e-3), loss_at, 10))
    assert len(tried) == 10
    assert best["lr"] < 2e-3


def test_a_search_goes_on_where_it_stopped() -> None:
    whole, _ = logged(20, (0.02, 0.8))
    part, _ = logged(9, (0.02, 0.8))
    assert whole[:9] == part


def test_levels_hold_their_start() -> None:
    with pytest.raises(ValueError, match=r"start=0.7 must be one of choices=\(0.5, 0.9\)"):
        Axis(0.7, (0.5, 0.9))


def test_a_search_without_trials_is_refused() -> None:
    with pytest.raises(ValueError, match="trials=0 must be 1 or more"):
        search(space(), lambda values: 0.0, 0)


def test_a_search_can_begin_where_another_ended() -> None:
    moved = space().begun_at({"lr": 0.3, "momentum": 0.8})
    assert moved.values(moved.origin) == {"lr": 0.3, "momentum": 0.8}
    assert list(moved.axes) == list(space().axes)
