"""Why NeuRMS stands where it does at equal wall-clock."""

from __future__ import annotations

import math

import pytest

from benchmarks.perceptron_rows import Cell
from benchmarks.tables.reasons import reasons, split


def cell(method: str, seconds: float, steps: int, ms: float, score: float) -> Cell:
    return Cell(("mnist", "4-2", seconds), method, 0.1, steps, ms, (score,), 0.5, 0, 6)


# AdamW gains five points for every e-fold of its steps.
ADAMW = [
    cell("AdamW", 1, 1000, 1.0, 0.90),
    cell("AdamW", math.e, 2718, 1.0, 0.90 + 0.05 * math.log(2.718)),
]


def test_a_slow_step_s_part_is_what_adamw_loses_with_as_many_steps_less() -> None:
    ours = cell("NeuRMS-U", 1, 905, 1.105, 0.88)
    gap, time, left = split(ours, ADAMW)
    assert gap == pytest.approx(-2.0)
    assert time == pytest.approx(-5 * math.log(1.105))
    assert left == pytest.approx(gap - time)
    assert "| mnist 4-2 1 s | NeuRMS-U | 1.10 | -2.00 | -0.50 | -1.50 |" in reasons([*ADAMW, ours])


def test_one_budget_tells_nothing() -> None:
    assert split(cell("NeuRMS-U", 1, 905, 1.105, 0.88), ADAMW[:1]) is None
    assert reasons(ADAMW[:1]) == ""
