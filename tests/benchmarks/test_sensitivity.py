"""The section on how NeuRMS's settings matter."""

from __future__ import annotations

from benchmarks.tables.sensitivity import changes, sensitivity

BASE = [0.90, 0.91, 0.92, 0.93]


def content(**rows: list[float]) -> dict:
    runs = {"U/search/lr 1": {"accuracy": 0.5}}
    for name, series in {"U": BASE, **rows}.items():
        for seed, accuracy in enumerate(series):
            runs[f"{name}/lr 0.1/seed {seed}"] = {"accuracy": accuracy}
    return {"runs": runs, "settings": {"trials": 6}}


def shifted(by: float) -> list[float]:
    # Not all by the same: a paired test needs some spread.
    return [score + by + noise for score, noise in zip(BASE, (0, 1e-4, -1e-4, 0), strict=True)]


def test_a_change_is_set_against_the_default_of_its_variant() -> None:
    (found,) = changes(content(**{"U, beta .9": shifted(-0.01), "F, c_max 1": shifted(0.02)}))
    assert (found.variant, found.name, found.data) == ("U", "beta .9", "mnist")
    assert abs(found.points + 1.0) < 1e-9
    assert found.p < 0.05


def test_the_defaults_stand_unless_something_is_significantly_better() -> None:
    worse = sensitivity([content(**{"U, beta .9": shifted(-0.01)})])
    assert "the defaults stand" in worse
    assert "| beta .9 | -1.00 (p < .001) |" in worse
    better = sensitivity([content(**{"U, beta .9": shifted(0.01)})])
    assert "significantly better than the default: +1.00 by beta .9 (U, mnist, p < .001)" in better


def test_there_is_no_section_without_runs() -> None:
    assert sensitivity([content()]) == ""
