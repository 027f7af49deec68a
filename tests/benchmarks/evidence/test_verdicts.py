"""Verdicts against independent truth: scipy's tests and intervals, the closed test procedure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_rel

from benchmarks.evidence.verdicts import verdicts
from benchmarks.significance import equivalent, holm


def closed(p_values: Sequence[float]) -> list[float]:
    """Holm's procedure as the closure of Bonferroni's test over all subsets (Marcus et al.)."""
    indices = range(len(p_values))
    subsets = [s for k in indices for s in itertools.combinations(indices, k + 1)]
    bonferroni = {s: min(1.0, len(s) * min(p_values[i] for i in s)) for s in subsets}
    return [max(p for s, p in bonferroni.items() if i in s) for i in indices]


@given(st.lists(st.floats(0.0, 1.0, allow_subnormal=False), min_size=1, max_size=7))
def test_holm_is_the_closed_bonferroni_test(p_values: list[float]) -> None:
    assert holm(p_values) == pytest.approx(closed(p_values))


def test_a_test_that_could_not_be_made_counts_as_one() -> None:
    assert holm([0.01, math.nan]) == [0.02, 1.0]


@pytest.mark.parametrize("shift", [-0.03, -0.01, 0.0, 0.012, 0.05])
@pytest.mark.parametrize("count", [2, 5, 10])
def test_tost_holds_where_the_interval_lies_inside_the_margin(shift: float, count: int) -> None:
    generator = np.random.default_rng(count)
    first = generator.normal(2.0, 0.02, count)
    second = first + generator.normal(shift, 0.008, count)
    p = equivalent(first.tolist(), second.tolist(), 0.02)["p"]
    # TOST at level a and the confidence interval of 1 - 2 a are the same decision.
    for level in (0.001, 0.05, 0.2, 0.4):
        low, high = ttest_rel(first, second).confidence_interval(1 - 2 * level)
        assert (p < level) == (low > -0.02 and high < 0.02)


def test_tost_errs_as_often_as_it_says_at_the_margin() -> None:
    generator = np.random.default_rng(0)
    draws = generator.normal(0.02, 0.004, (2000, 5))
    zero = [0.0] * 5
    errors = sum(equivalent(draw.tolist(), zero, 0.02)["p"] < 0.05 for draw in draws)
    assert 70 <= errors <= 130


def test_tost_needs_a_margin_and_two_pairs() -> None:
    with pytest.raises(ValueError, match=r"margin=0.0 must be positive"):
        equivalent([1.0, 2.0], [1.0, 2.1], 0.0)
    assert math.isnan(equivalent([1.0], [1.0], 0.1)["p"])


BASE = [2.30, 2.31, 2.29, 2.32, 2.30]
WORSE = [2.41, 2.39, 2.40, 2.44, 2.38]
SAME = [2.301, 2.309, 2.292, 2.319, 2.301]
NOISY = [2.20, 2.45, 2.25, 2.30, 2.39]


def test_all_rows_and_budgets_are_one_family() -> None:
    budgets = {
        "1 s": {"AdamW": BASE, "a": WORSE, "b": SAME},
        "5 s": {"AdamW": BASE, "a": NOISY, "b": SAME},
    }
    found = verdicts(budgets, "AdamW", margin=0.02, better="lower")
    p = [float(ttest_rel(budgets[b][name], BASE).pvalue) for b, name in found]
    assert [verdict.p for verdict in found.values()] == pytest.approx(closed(p))
    alone = verdicts({"1 s": budgets["1 s"]}, "AdamW", margin=0.02, better="lower")
    assert alone["1 s", "a"].p < found["1 s", "a"].p


def test_level_is_said_only_by_equivalence() -> None:
    rows = {"AdamW": BASE, "worse": WORSE, "same": SAME, "noisy": NOISY}
    found = verdicts({"": rows}, "AdamW", margin=0.02, better="lower")
    words = {name: verdict.word for (_, name), verdict in found.items()}
    # The noisy row's difference is not significant, and yet it is not level.
    assert words == {"worse": "behind", "same": "level", "noisy": "open"}
    higher = verdicts({"": rows}, "AdamW", margin=0.02, better="higher")
    assert higher["", "worse"].word == "ahead"


def test_a_sure_difference_within_the_margin_is_both() -> None:
    rows = {"AdamW": BASE, "near": [loss + 0.003 + 1e-4 * i for i, loss in enumerate(BASE)]}
    found = verdicts({"": rows}, "AdamW", margin=0.02, better="lower")
    assert found["", "near"].word == "behind within the margin"
