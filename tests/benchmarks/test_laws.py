"""The fitted exponent against scipy's own regression."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.laws import exponent

scipy_stats = pytest.importorskip("scipy.stats")

WIDTHS = (64, 128, 256, 512, 1024)


def runs(seed: int, constant: float) -> list[dict[str, float]]:
    noise = np.random.default_rng(seed).normal(size=len(WIDTHS))
    return [
        {"width": w, "batch": constant, "y": constant / w * np.exp(0.2 * e)}
        for w, e in zip(WIDTHS, noise, strict=True)
    ]


def test_one_series_is_a_line_in_logarithms() -> None:
    own = runs(0, 3.0)
    found = exponent(own, "y")
    line = scipy_stats.linregress(np.log(WIDTHS), np.log([run["y"] for run in own]))
    half = scipy_stats.t.ppf(0.975, len(own) - 2) * line.stderr
    assert found is not None
    assert found["k"] == pytest.approx(line.slope)
    assert (found["low"], found["high"]) == pytest.approx((line.slope - half, line.slope + half))


def test_series_have_constants_of_their_own() -> None:
    both = runs(0, 3.0) + runs(1, 700.0)
    found = exponent(both, "y", lambda run: run["batch"])
    x = np.log([run["width"] for run in both])
    groups = np.array([run["batch"] for run in both])
    design = np.stack([x, groups == 3.0, groups == 700.0], axis=1).astype(float)
    solution = np.linalg.lstsq(design, np.log([run["y"] for run in both]), rcond=None)[0]
    assert found is not None
    assert found["k"] == pytest.approx(solution[0])
    assert found["runs"] == 10


def test_too_few_runs_give_no_law() -> None:
    assert exponent(runs(0, 1.0)[:2], "y") is None
    assert exponent([{"width": 64, "y": 1.0}] * 5, "y") is None
