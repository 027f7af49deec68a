import math

import pytest
from scipy.stats import t

from benchmarks.language_rows import best_rate, finals, first_below, rows


def run(*losses: float) -> dict:
    return {"curve": [[10 * (i + 1), loss, 1.0] for i, loss in enumerate(losses)]}


RUNS = {
    "tune adamw lr=0.1 steps=20": run(2.5),
    "tune adamw lr=0.2 steps=20": run(2.0),
    "tune muon lr=0.1 steps=20": run(1.0),
    "tune muon lr=0.2 steps=20": {"curve": [], "diverged": 3},
    "final adamw lr=0.2 seed=1 steps=40": run(5.0, 4.0, 3.0, 2.0),
    "final adamw lr=0.2 seed=2 steps=40": run(5.0, 4.0, 3.0, 2.2),
    "final adamw lr=0.1 seed=1 steps=40": run(1.0, 1.0, 1.0, 1.0),
    "final muon lr=0.1 seed=1 steps=40": run(4.0, 2.6, 1.6, 1.0),
    "final muon lr=0.1 seed=2 steps=40": run(4.0, 2.6, 1.6, 1.1),
    "final muon lr=0.1 seed=2 steps=80": run(0.0),
    "other final muon lr=0.1 seed=2 steps=40": run(0.0),
}


def test_rate_is_the_best_that_was_tuned() -> None:
    assert best_rate(RUNS, "adamw") == "0.2"
    assert best_rate(RUNS, "muon") == "0.1"
    assert best_rate({"final x lr=0.3 seed=1 steps=1": run(1.0)}, "x") == "0.3"


def test_finals_are_those_at_the_tuned_rate_the_steps_and_the_prefix() -> None:
    found = finals(RUNS, 40)
    assert {name: sorted(own) for name, own in found.items()} == {"adamw": [1, 2], "muon": [1, 2]}


def test_rows_compare_seed_by_seed() -> None:
    muon, adamw = rows(RUNS, 40, step_ms={"adamw": 10.0, "muon": 20.0})
    assert (muon["optimizer"], adamw["optimizer"]) == ("muon", "adamw")
    assert muon["loss"] == pytest.approx(1.05)
    assert muon["difference"] == pytest.approx(-1.05)
    # Differences -1.0 and -1.1: their mean is 21 standard errors from zero, one degree of freedom.
    assert muon["p"] == pytest.approx(2 * t.sf(21.0, df=1), rel=1e-6)
    # AdamW's 2.1 lies half way between 2.6 at step 20 and 1.6 at step 30.
    assert muon["steps"] == pytest.approx(25.0)
    assert muon["step_ratio"] == pytest.approx(1.6)
    assert muon["speedup"] == pytest.approx(0.8)
    assert adamw["p"] is None
    assert adamw["step_ratio"] == pytest.approx(1.0)


def test_a_loss_that_is_not_reached_has_no_step() -> None:
    assert first_below([run(5.0, 4.0), run(5.0, 3.0)], 3.4) is None
    assert first_below([run(5.0, 4.0), run(5.0, 3.0)], 3.5) == 20.0


def test_one_seed_has_no_test() -> None:
    kept = {key: value for key, value in RUNS.items() if "seed=2" not in key}
    muon = rows(kept, 40)[0]
    assert muon["p"] is None
    assert muon["std"] is None
    assert not math.isnan(muon["difference"])
