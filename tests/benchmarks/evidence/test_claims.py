"""Claims: each kind against scipy's own tests, corrected for the rows of the claim."""

from __future__ import annotations

import pytest
from scipy.stats import ttest_1samp

from benchmarks.contest import TASKS, entrants_of
from benchmarks.evidence.claims import CLAIMS, Claim, outcomes

BASE = [2.30, 2.31, 2.29, 2.32, 2.30]
BETTER = [2.27, 2.29, 2.265, 2.29, 2.272]
SHIFT = [0.004, 0.006, 0.005, 0.007, 0.003]
WORSE = [loss + shift for loss, shift in zip(BASE, SHIFT, strict=True)]
SCORES = {"AdamW": BASE, "better": BETTER, "worse": WORSE}


def p_of(row: str, shift: float, alternative: str) -> float:
    differences = [a - b for a, b in zip(SCORES[row], BASE, strict=True)]
    return float(ttest_1samp(differences, shift, alternative=alternative).pvalue)


def test_ahead_is_the_paired_test_corrected_over_the_rows_of_the_claim() -> None:
    claim = Claim("t", ("better", "worse"), "ahead", "AdamW")
    first, second = outcomes(claim, SCORES, "lower")
    p = sorted(p_of(row, 0.0, "two-sided") for row in ("better", "worse"))
    assert sorted((first.p, second.p)) == pytest.approx([2 * p[0], max(2 * p[0], p[1])])
    assert first.holds
    # Significant as well, on the other side.
    assert second.p < 0.05
    assert not second.holds


def test_near_looks_at_one_side_alone() -> None:
    claim = Claim("t", ("better",), "near", "AdamW", 0.01)
    (found,) = outcomes(claim, SCORES, "lower")
    assert found.p == pytest.approx(p_of("better", 0.01, "less"))
    assert found.holds
    (level,) = outcomes(Claim("t", ("better",), "level", "AdamW", 0.01), SCORES, "lower")
    assert level.p == pytest.approx(p_of("better", -0.01, "greater"))
    assert not level.holds


def test_where_more_is_better_sides_change() -> None:
    scores = {name: [-figure for figure in series] for name, series in SCORES.items()}
    claim = Claim("t", ("worse",), "near", "AdamW", 0.01)
    (lower,), (higher,) = outcomes(claim, SCORES, "lower"), outcomes(claim, scores, "higher")
    assert higher.p == pytest.approx(lower.p)
    assert higher.difference == pytest.approx(-lower.difference)


def test_rows_that_were_not_run_are_left_out() -> None:
    claim = Claim("t", ("better", "missing"), "ahead", "AdamW")
    assert [found.row for found in outcomes(claim, SCORES, "lower")] == ["better"]
    assert outcomes(claim, {"better": BETTER}, "lower") == []


def test_claims_are_about_tasks_that_there_are() -> None:
    for claim in CLAIMS:
        assert claim.task in TASKS
        assert claim.against in entrants_of(claim.task)
        assert (claim.margin > 0) == (claim.kind != "ahead")
