import math

import pytest
from scipy.stats import ttest_rel

from benchmarks.significance import band, compared, holm, spread


def test_holm_by_hand() -> None:
    # Sorted .01 .02 .03 .04 times 4 3 2 1: .04 .06 .06 .04, then never falling.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]


def test_compared_corrects_for_the_number_of_tests() -> None:
    own = [0.9, 0.92, 0.95, 0.91]
    others = {"a": [0.8, 0.83, 0.84, 0.82], "b": [0.9, 0.93, 0.94, 0.91]}
    found = compared(own, others)
    p = {name: float(ttest_rel(own, series).pvalue) for name, series in others.items()}
    assert found["a"]["difference"] == pytest.approx(0.0975)
    assert found["a"]["p_holm"] == pytest.approx(2 * p["a"])
    assert found["b"]["p_holm"] == pytest.approx(max(p["b"], 2 * p["a"]))


def test_band_holds_the_mean_and_narrows_with_it() -> None:
    low, high = band([1.0, 2.0, 3.0, 4.0])
    assert 1.0 <= low < 2.5 < high <= 4.0
    assert band([2.0, 2.0, 2.0]) == (2.0, 2.0)
    assert band([1.0, 2.0, 3.0, 4.0]) == (low, high)


def test_one_seed_has_no_deviation() -> None:
    assert spread([0.5])[0] == 0.5
    assert math.isnan(spread([0.5])[1])
    assert all(map(math.isnan, band([0.5])))


def test_a_series_with_a_diverged_run_has_no_mean() -> None:
    assert all(math.isnan(value) for value in spread([1.0, math.nan, 2.0]))
