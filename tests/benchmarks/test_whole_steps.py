"""Sections on whole steps say what their files hold."""

from __future__ import annotations

from typing import Any

from benchmarks.tables.whole_steps import compiled, images

MADE: dict[str, Any] = {
    "command": "neurms bench x",
    "environment": {"commit": "abc1234", "machine": "m", "versions": {"torch": "2"}},
}


def row(ratio: float, breaks: int = 0) -> dict[str, Any]:
    return {"ms": 1.0, "ratio": ratio, "graphs": 2, "breaks": breaks, "recompilations": 0}


def test_counts_are_those_of_all_rows() -> None:
    runs = {"one": {"sgd": row(1.0), "P": row(1.05)}, "two": {"sgd": row(1.0, breaks=3)}}
    text = compiled({**MADE, "runs": runs})
    assert "2 graphs, 0 to 3 breaks, 0 recompilations" in text
    assert "| P | x1.050 |  |" in text


def test_images_have_a_row_for_each_optimizer() -> None:
    text = images({**MADE, "runs": {"resnet20": {"sgd": row(1.0), "U": row(1.02)}}})
    assert "| U | x1.020 |" in text
