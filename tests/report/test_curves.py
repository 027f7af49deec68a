"""Curves: sorted for people, thinned without loss of what they say."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from neurms.callbacks.profiler.logged import LoggedValues
from neurms.report import ProfilerReport, Run, read_run
from neurms.report.curves import curve_groups, diverged_at, loss_texts
from neurms.report.recommendation import recommendation
from neurms.report.runs import RUN_FILE, logged_on
from neurms.report.summary import Summary
from tests.report.small_runs import run


def test_a_long_curve_has_few_points_whose_mean_is_that_of_all_values() -> None:
    logged, values = LoggedValues(), [float(i % 7) for i in range(20_000)]
    for step, value in enumerate(values):
        logged.add("loss", step, torch.tensor(value))
    points = logged.take(all_=True)["loss"]
    # 400 one by one, then 200 by twos, by threes, ...: harmonic numbers.
    assert len(points) == pytest.approx(200 * (1.6 + math.log(100)), abs=10)
    assert points[:399] == list(enumerate(values[:399]))
    begins = [0, *(step + 1 for step, _ in points[:-1])]
    for begin, (step, value) in zip(begins, points, strict=True):
        own = values[begin : step + 1]
        assert value == pytest.approx(sum(own) / len(own))


def test_what_is_no_number_is_passed_over() -> None:
    logged = LoggedValues()
    for value in ("a", None, torch.ones(2), torch.tensor([2.0]), 3, True):
        logged.add("x", 0, value)
    assert [value for _, value in logged.take(all_=True)["x"]] == [2.0, 3.0, 1.0]


def test_training_and_validation_share_a_plot() -> None:
    names = ("val_acc", "train loss", "val/loss", "eval_loss", "train_acc_epoch", "A: val_f1", "f1")
    groups = curve_groups({name: [(0, 1.0)] for name in names})
    assert {what: list(own) for what, own in groups.items()} == {
        "loss": ["train loss", "val/loss", "eval_loss"],
        "acc": ["val_acc", "train_acc_epoch"],
        "f1": ["A: val_f1", "f1"],
    }


def test_the_end_of_a_training_is_a_mean_and_that_of_a_validation_is_its_last() -> None:
    points = [(step, float(value)) for step, value in enumerate([5.0] * 18 + [1.0, 3.0])]
    assert loss_texts({"train loss": points, "val_loss": points}) == {
        "train loss": "5 → 2",
        "val_loss": "5 → 3",
    }


def test_a_loss_that_broke_is_found() -> None:
    logged = {
        "acc": [(1, math.nan)],
        "val_loss": [(1, 2.0), (5, math.nan)],
        "loss": [(7, math.inf)],
    }
    assert diverged_at(logged) == 5
    assert diverged_at({"loss": [(1, 2.0)]}) is None


def test_a_plain_loop_logs_and_a_file_brings_it_back(tmp_path: Path) -> None:
    again = run(tmp_path / "b", loss=True)
    assert run(tmp_path / "a").report().run.logged == {}
    ours, theirs = again.report().run.logged, read_run(tmp_path / "b").logged
    assert [step for step, _ in ours["train_loss"]] == list(range(6))
    assert ours.keys() == theirs.keys()
    for (step, value), (own_step, own) in zip(
        theirs["train_loss"], ours["train_loss"], strict=True
    ):
        assert (step, value) == (own_step, pytest.approx(own, rel=1e-6))
    again.report().to_json(tmp_path / "run.json")
    assert read_run(tmp_path / "run.json").logged == theirs


def test_not_a_number_comes_back_from_a_file_and_leads_the_page(tmp_path: Path) -> None:
    run(tmp_path / "a")
    with (tmp_path / "a" / RUN_FILE).open("a") as stream:
        stream.write('{"logged": {"val_loss": [[3, null], [4, "inf"]]}}\n')
    report = ProfilerReport.read(tmp_path / "a")
    assert math.isnan(report.run.logged["val_loss"][0][1])
    assert report.run.logged["val_loss"][1] == (4, math.inf)
    assert report.recommendation().startswith("The loss was not finite from step 3 on")
    report.to_html(tmp_path / "page.html")


def test_what_a_resumed_run_does_again_counts_once(tmp_path: Path) -> None:
    run(tmp_path / "a", loss=True, steps=6)
    run(tmp_path / "a", loss=True, steps=4, first_step=4)
    again = run(tmp_path / "a", loss=True, steps=2, first_step=6)
    for logged in (read_run(tmp_path / "a").logged, again.report().run.logged):
        assert [step for step, _ in logged["train_loss"]] == list(range(8))


def test_what_came_with_the_checkpoint_is_kept() -> None:
    earlier = {"val_loss": [(2, 1.0), (4, 0.5), (6, 0.4)], "train loss": [(3, 1.0), (4, 2.0)]}
    assert logged_on(earlier, 4, {"train loss": [(4, 3.0), (5, 1.0)]}) == {
        "val_loss": [(2, 1.0), (4, 0.5)],
        "train loss": [(3, 1.0), (4, 3.0), (5, 1.0)],
    }


def test_a_report_without_steps_says_what_to_change() -> None:
    assert "lower warmup_steps" in recommendation(Summary(Run({}, [])))
