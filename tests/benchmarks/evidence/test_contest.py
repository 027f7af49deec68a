"""Contests on a task of milliseconds: resumed, shared, and every rule broken once."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.evidence import contest, entrants
from benchmarks.evidence.contest import run
from benchmarks.evidence.design import NETWORK_SEEDS, Design
from benchmarks.evidence.ledger import rows
from benchmarks.evidence.rules import violations
from benchmarks.tables.contests import section

TRIALS = 6


class Lines:
    """Least squares of four numbers, a few steps."""

    design = Design("text-64", "loss", "lower", 0.02, TRIALS, NETWORK_SEEDS)

    def __init__(self) -> None:
        self.trained: list[tuple[int, bool]] = []

    def train(
        self, make: Callable[[nn.Module], torch.optim.Optimizer], seed: int, *, reported: bool
    ) -> dict[str, Any]:
        self.trained.append((seed, reported))
        torch.manual_seed(seed)
        model = nn.Linear(4, 2)
        optimizer = make(model)
        inputs, truth = torch.randn(32, 4), torch.ones(4, 2)
        for _ in range(5):
            loss = (model(inputs) - inputs @ truth).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return {"test" if reported else "validation": float(loss.detach())}


METHODS = {name: entrants.text()[name] for name in ("AdamW", "SGD")}


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have runs come from a clean commit, whatever this checkout looks like."""
    made = {"commit": "abc1234", "machine": "a processor"}
    monkeypatch.setattr("benchmarks.harness.Results.made", property(lambda self: made))
    yield
    # Results flush them, and other tests need them.
    torch.set_flush_denormal(False)


@pytest.fixture
def content(tmp_path: Path, clean: None) -> dict[str, Any]:
    assert run(Lines(), METHODS, tmp_path / "lines.json")
    found: dict[str, Any] = json.loads((tmp_path / "lines.json").read_text())
    return found


def test_a_contest_holds_to_the_rules_and_makes_its_table(content: dict[str, Any]) -> None:
    assert violations(content) == []
    found = rows(content)
    assert [row.name for row in found] == ["AdamW", "SGD"]
    for row in found:
        assert row.complete
        assert len(row.scores) == len(NETWORK_SEEDS)
        assert row.chosen_figure == min(
            run["validation"] for trial in row.trials.values() for run in trial.values()
        )
    text = section(content)
    assert "| SGD |" in text
    assert "lower" not in text


@pytest.mark.parametrize(
    ("steps", "shown"), [((6, 5), True), ((5, 5), False), ((None, 5), False), ((None, None), False)]
)
def test_steps_are_shown_where_rows_took_different_ones(
    content: dict[str, Any], steps: tuple[int | None, ...], shown: bool
) -> None:
    for run_ in content["runs"].values():
        run_["steps"] = dict(zip(METHODS, steps, strict=True))[run_["row"]]
    assert ("| steps |" in section(content)) == shown


def test_a_second_call_trains_nothing(tmp_path: Path, clean: None) -> None:
    first, second = Lines(), Lines()
    assert run(first, METHODS, tmp_path / "lines.json")
    assert run(second, METHODS, tmp_path / "lines.json")
    assert len(first.trained) == len(METHODS) * (TRIALS + len(NETWORK_SEEDS))
    assert second.trained == []


def test_a_broken_off_contest_goes_on_and_ends_alike(tmp_path: Path, clean: None) -> None:
    class Killed(Lines):
        def train(self, *arguments: Any, **named: Any) -> dict[str, Any]:
            if len(self.trained) == 4:
                raise KeyboardInterrupt
            return super().train(*arguments, **named)

    with pytest.raises(KeyboardInterrupt):
        run(Killed(), METHODS, tmp_path / "lines.json")
    rest = Lines()
    assert run(rest, METHODS, tmp_path / "lines.json")
    assert len(rest.trained) == len(METHODS) * (TRIALS + len(NETWORK_SEEDS)) - 4
    assert run(Lines(), METHODS, tmp_path / "whole.json")
    paths = (tmp_path / "lines.json", tmp_path / "whole.json")
    broken, whole = (json.loads(path.read_text())["runs"] for path in paths)
    assert broken == whole


def test_a_row_that_another_process_works_on_is_left_to_it(tmp_path: Path, clean: None) -> None:
    path = tmp_path / "lines.json"
    program = (
        "import sys; from pathlib import Path; from benchmarks.evidence.contest import _claimed\n"
        "with _claimed(Path(sys.argv[1]), 'AdamW') as mine: print(mine, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(contest.__file__).parents[2],
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "True\n"
        assert not run(Lines(), METHODS, path)
        assert [row.name for row in rows(json.loads(path.read_text()))] == ["SGD"]
        other.communicate("\n")
    assert run(Lines(), METHODS, path)


def test_another_design_for_the_same_file_is_refused(tmp_path: Path, clean: None) -> None:
    assert run(Lines(), METHODS, tmp_path / "lines.json")
    task = Lines()
    task.design = Design("text-64", "loss", "lower", 0.02, TRIALS + 1, NETWORK_SEEDS)
    with pytest.raises(SystemExit, match="holds runs with other settings"):
        run(task, METHODS, tmp_path / "lines.json")


def _of(content: dict[str, Any], kind: str) -> list[str]:
    return [key for key, run in content["runs"].items() if run["kind"] == kind]


def _design(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content["settings"]["design"][name] = value

    return change


def _run(kind: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content["runs"][_of(content, kind)[0]].update(values)

    return change


def _without(kind: str, count: int = 1) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for key in _of(content, kind)[:count]:
            del content["runs"][key]

    return change


def _axis(content: dict[str, Any]) -> None:
    del content["settings"]["rows"]["AdamW"]["axes"]["momentum"]


def _unfused(content: dict[str, Any]) -> None:
    content["settings"]["rows"]["AdamW"]["settings"] = {}


def _figureless(content: dict[str, Any]) -> None:
    del content["runs"][_of(content, "seed")[0]]["test"]


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no design": (lambda content: content["settings"].pop("design"), "no design of edition"),
    "old edition": (_design("edition", 1), "no design of edition"),
    "one split": (_design("reported_on", "validation"), "the split that is reported"),
    "tuned seeds": (_design("tuning_seeds", [101]), "are tuned on and reported"),
    "other seeds": (_design("seeds", [101, 102, 103]), "not those that were fixed"),
    "no margin": (_design("margin", 0.0), "no margin"),
    "one trial less": (_without("trial"), "5 trials instead of 6"),
    "one seed less": (_without("seed"), r"it reports the seeds \[102"),
    "momentum not searched": (_axis, r"leaves out \['momentum'\]"),
    "not fused": (_unfused, "fused kernel is not used"),
    "not the chosen settings": (_run("seed", settings={"lr": 1.0}), "chosen was"),
    "a trial saw the test": (_run("trial", test=1.0), "a trial has looked at"),
    "other precision": (_run("seed", precision="bfloat16, float32"), "precision is bfloat16"),
    "uncommitted": (_run("seed", commit="abc1234+changes"), "not a clean one"),
    "no commit": (_run("trial", commit=None), "not a clean one"),
    "no machine": (_run("seed", machine=None), "on which machine"),
    "no figure": (_figureless, "no figure of the test split"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_broken_rule_is_named(content: dict[str, Any], name: str) -> None:
    change, words = BROKEN[name]
    broken = copy.deepcopy(content)
    change(broken)
    assert re.search(words, "; ".join(violations(broken)))
