"""How far two machines agree, from rows whose outcome is known."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.tables import again
from benchmarks.tables.again import agreement


def test_agreement_counts_signs_and_significance() -> None:
    first = {"A": (-1.0, 0.01), "B": (0.2, 0.6), "C": (0.5, 0.02), "D": (0.1, 0.3)}
    second = {"A": (-0.8, 0.04), "B": (-0.1, 0.9), "C": (0.4, 0.2), "E": (1.0, 0.0)}
    said = agreement(first, second)
    assert "Of 3 comparisons with AdamW 2 have the same sign." in said
    assert "Of the 2 with p below .05 on the first machine, 1 are so on the second" in said
    assert "None is significant on one machine and of the other sign" in said


def test_agreement_names_what_turned_round() -> None:
    said = agreement({"A": (-1.0, 0.2)}, {"A": (0.8, 0.01)})
    assert "On the first machine none has p below .05." in said
    assert "Significant on one machine and of the other sign on the other: A." in said


def steps(**milliseconds: float) -> dict[str, Any]:
    environment = {"commit": "abc", "machine": "some", "versions": {"torch": "2"}}
    runs = {"small": {name: {"ms": ms} for name, ms in {"adamw": 10.0, **milliseconds}.items()}}
    return {"runs": runs, "command": "neurms bench llama_step", "environment": environment}


def test_costs_stand_side_by_side() -> None:
    files = {"llama_step": steps(racs=8, muon=20), "again/llama_step": steps(racs=12.5, muon=40)}
    page = again.page(files)
    assert "| racs | 1.25 | 0.80 |" in page
    assert "| muon | 0.50 | 0.25 |" in page
    assert "1.00 (small)" in page
    assert "muon at small, from 0.50 to 0.25" in page


@pytest.mark.parametrize("name", again.NAMES)
def test_a_file_alone_makes_no_section(name: str) -> None:
    assert "\n## " not in again.page({name: steps(racs=8)})


def contest(**scores: list[float]) -> dict[str, Any]:
    """Return a comparison of one trial whose rows have these figures."""
    runs: dict[str, Any] = {}
    settings = {"lr": 0.1}
    for row, figures in scores.items():
        about = {"row": row, "settings": settings, "state_bytes": 1}
        runs[f"{row}/t"] = {**about, "kind": "trial", "seed": 0, "validation": figures[0]}
        for k, figure in enumerate(figures):
            runs[f"{row}/{k}"] = {**about, "kind": "seed", "seed": 101 + k, "test": figure}
    design = {
        **{"task": "text-64", "figure": "loss, nats", "better": "lower", "margin": 0.02},
        **{"trials": 1, "seeds": [101, 102, 103], "tuning_seeds": [0]},
        **{"reported_on": "test", "chosen_on": "validation", "details": {}},
    }
    rows = {row: {"rule": "sgd", "settings": {}, "axes": {"lr": "rate"}} for row in scores}
    return {
        **steps(racs=8),
        "runs": runs,
        "settings": {"design": design, "rows": rows},
    }


def test_a_comparison_stands_side_by_side_with_the_rank_correlation() -> None:
    adamw, a, b = [2.0, 2.1, 2.3], [1.0, 1.11, 1.2], [1.4, 1.61, 1.7]
    one = contest(AdamW=adamw, A=a, B=b, C=[3.0, 3.15, 3.2])
    two = contest(AdamW=adamw, A=[1.6, 1.71, 1.8], B=b)
    page = again.page({"contests/text-64": one, "again/text-64": two})
    assert "| A | 0.1 | 0.1 | 1.1033 | 1.7033 |" in page
    # Of three pairs one is the other way round; C was run on one machine alone.
    assert "rank correlation of the rows' means is 0.33." in page
    assert "| C |" not in page
