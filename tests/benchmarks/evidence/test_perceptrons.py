"""Perceptrons at equal time: steps from times, duels over all budgets, a section from files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import ttest_rel

from benchmarks.evidence import perceptrons
from benchmarks.evidence.design import PERCEPTRON_SEEDS
from benchmarks.evidence.ledger import Row
from benchmarks.evidence.perceptrons import PLACES, ROWS, steps
from benchmarks.tables.equal_time import NAMES, duels, section

FIRST, SECOND = tuple(PLACES)[:2]


def row(name: str, validation: float, scores: list[float]) -> Row:
    settings = (("lr", 0.1),)
    design = {
        "better": "higher",
        "chosen_on": "validation",
        "reported_on": "test",
        "trials": 1,
        "seeds": list(range(len(scores))),
    }
    return Row(
        name,
        {"rule": "", "axes": {"lr": "rate"}},
        design,
        {settings: {0: {"validation": validation}}},
        {settings: {seed: {"test": score} for seed, score in enumerate(scores)}},
    )


def test_a_row_takes_the_steps_that_its_time_allows() -> None:
    times = {"512": {"AdamW": 2.0, "P": 4.0}, "1024-1024": {}}
    assert steps(FIRST, "AdamW", times) == 150
    assert steps(FIRST, "P", times) == 75


def test_without_measured_times_the_command_that_makes_them_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(perceptrons, "TIMES", tmp_path / "none.json")
    perceptrons.step_ms.cache_clear()
    with pytest.raises(SystemExit, match="contest_step --task perceptrons"):
        perceptrons.step_ms()


def test_every_row_is_known_and_every_place_has_its_seconds() -> None:
    assert set(perceptrons.rows()) == set(ROWS)
    assert len(PLACES) == 10


def test_the_chosen_one_meets_the_best_other_and_all_pairs_count() -> None:
    a, b = [0.90, 0.92, 0.91], [0.80, 0.83, 0.81]
    weak, strong = [0.93, 0.95, 0.96], [0.70, 0.72, 0.71]
    found = {
        # P momentum is the better one on the test images, P on those that choose.
        FIRST: [row("P", 0.9, a), row("P momentum", 0.8, weak), row("SGD", 0.5, b)],
        SECOND: [row("P", 0.9, b), row("SGD", 0.5, strong), row("AdamW", 0.5, a)],
    }
    first, second = duels(found, 0.002)
    assert (first.own, first.other) == ("P", "SGD")
    assert first.difference == pytest.approx(0.91 - 0.81333333)
    assert (second.own, second.other) == ("P", "AdamW")
    assert second.difference < 0
    raw = [ttest_rel(x, y).pvalue for x, y in ((a, b), (b, strong), (b, a))]
    ordered = sorted(raw)
    assert first.p >= raw[0]
    assert min(first.p, second.p) == pytest.approx(3 * ordered[0], rel=1e-6)


def test_the_section_is_empty_without_files_and_counts_with_one() -> None:
    assert section({}) == ""
    rows: dict[str, Any] = {
        name: {"rule": "adamw", "settings": {"fused": True}, "axes": {"lr": "rate"}}
        for name in ("AdamW", "P")
    }
    design = {
        "task": FIRST,
        "figure": "accuracy",
        "better": "higher",
        "margin": 0.002,
        "trials": 1,
        "seeds": list(PERCEPTRON_SEEDS),
        "tuning_seeds": [0],
        "chosen_on": "validation",
        "reported_on": "test",
        "details": {"network": "784-512-10", "seconds": 0.3, "batch": 128},
    }
    runs = {}
    for name, base, part in (("AdamW", 0.9, 3), ("P", 0.91, 4)):
        own = {"row": name, "settings": {"lr": 0.1}}
        runs[f"{name} trial"] = {**own, "kind": "trial", "seed": 0, "validation": base}
        for seed in PERCEPTRON_SEEDS:
            score = base + 1e-4 * (seed % part)
            runs[f"{name} {seed}"] = {**own, "kind": "seed", "seed": seed, "test": score}
    content = {
        "settings": {"design": design, "rows": rows},
        "runs": runs,
        "command": "neurms bench contest",
        "environment": {"commit": "abc1234", "machine": "m", "versions": {"torch": "2"}},
    }
    text = section({NAMES[0]: json.loads(json.dumps(content))})
    assert "| P | **91." in text
    parts = [sum(seed % part for seed in PERCEPTRON_SEEDS) for part in (3, 4)]
    assert f"{1.0 + 1e-3 * (parts[1] - parts[0]):+.2f}" in text
    assert "Of 1 budgets" in text
