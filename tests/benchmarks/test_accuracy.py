"""The MNIST table: p values after correction, and words made of them."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.tables.accuracy import against_baseline, mnist


def content(**p_values: float) -> dict[str, Any]:
    rows = [{"method": "AdamW"}] + [
        {"method": name, "against_baseline": {"difference": -0.001, "p": p}}
        for name, p in p_values.items()
    ]
    for row in rows:
        row.update(lr=0.1, mean=0.9, std=0.001, scores=[0.9], cpu_seconds=1.0)
    return {"summary": rows}


def test_p_values_are_corrected_for_their_number() -> None:
    found = against_baseline(content(A=0.01, B=0.03))
    assert found["A"] == pytest.approx((-0.1, 0.02))
    assert found["B"] == pytest.approx((-0.1, 0.03))


def test_the_words_follow_from_the_corrected_ones() -> None:
    section = mnist(content(A=0.03, B=0.04))
    assert "Not told apart from AdamW here: A; B." in section
    assert "ignificantly behind" not in section
    assert "Significantly behind AdamW here: A; B." in mnist(content(A=0.01, B=0.02))
