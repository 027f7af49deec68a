"""The task on text: how long its runs are, searches and reported ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.contest import entrants_of
from benchmarks.evidence import text
from benchmarks.evidence.ledger import rows
from benchmarks.harness import RESULTS
from benchmarks.language import Scale

TINY = Scale(width=8, layers=1, heads=1, batch=2, context=8)


class Counted(torch.optim.SGD):
    """Plain SGD that keeps the rates of its steps."""

    def __init__(self, model: nn.Module, rates: list[float]) -> None:
        super().__init__(model.parameters(), lr=0.1)
        self.rates = rates

    def step(self, closure: Any = None) -> Any:
        self.rates.append(self.param_groups[0]["lr"])
        return super().step(closure)


@pytest.mark.parametrize(("search_steps", "expected"), [(None, 12), (6, 6)])
def test_a_search_may_have_shorter_runs_with_the_whole_schedule(
    monkeypatch: pytest.MonkeyPatch, search_steps: int | None, expected: int
) -> None:
    parts = text.split(bytes(range(256)) * 40)
    monkeypatch.setattr(text, "prose", lambda: parts)
    monkeypatch.setattr(text, "BATCHES", {"validation": 1, "test": 1})
    task = text.Text("text-64-long", TINY, 12, 8, search_steps)
    rates: dict[bool, list[float]] = {True: [], False: []}
    for reported in (False, True):
        run = task.train(lambda m, r=rates[reported]: Counted(m, r), 0, reported=reported)
        assert set(run) & {"validation", "test"} == {"test" if reported else "validation"}
    assert {k: len(v) for k, v in rates.items()} == {True: 12, False: expected}
    # Both end near a rate of zero.
    assert all(found[-1] < 0.1 * max(found) for found in rates.values())
    said = task.design.details.get("steps of a search's runs")
    assert said == search_steps


def test_long_and_timed_runs_begin_their_search_where_short_ones_ended() -> None:
    content = json.loads((RESULTS / "contests" / "text-64.json").read_text())
    ended = {row.name: dict(row.chosen) for row in rows(content)}
    for task in ("text-64-long", "text-64-timed"):
        found = entrants_of(task)
        for name, other in (("RMNP", "RMNP"), ("Muon", "Muon"), ("Muon 3 rounds", "Muon")):
            axes = found[name].space.axes
            assert {axis: own.start for axis, own in axes.items()} == ended[other], (task, name)
    first = entrants_of("text-64")["RMNP"].space.axes
    assert {axis: own.start for axis, own in first.items()} != ended["RMNP"]


def test_at_equal_time_a_row_takes_the_steps_that_its_own_step_time_allows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "times.json"
    monkeypatch.setattr(text, "TIMES", path)
    with pytest.raises(SystemExit, match="contest_step --task text first"):
        text.timed("text-64-timed", "Muon")
    path.write_text(json.dumps({"runs": {"text-64": {"Muon": {"ratio": 1.5}, "P": {"ratio": 1}}}}))
    tasks = {row: text.timed("text-64-timed", row) for row in ("Muon", "P")}
    assert {row: task.steps for row, task in tasks.items()} == {"Muon": 200, "P": 300}
    # One design for all rows: what differs by row is no part of it.
    assert tasks["Muon"].design == tasks["P"].design
    assert tasks["P"].design.details["time"] == "of AdamW's 300 steps"


def test_every_row_at_equal_time_has_its_time() -> None:
    kept = json.loads(text.TIMES.read_text())["runs"]["text-64"]
    assert set(kept) == set(text.TIMED_ROWS)
