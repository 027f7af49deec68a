"""The page: whole, by itself, and safe with any name."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

import neurms
from neurms.callbacks.profiler import Profiler
from neurms.report import LayerRow, ProfilerReport
from neurms.report.comparison import names
from neurms.report.plots import fitted_law
from neurms.report.svg import Axis, Line, boxes, lines, stacked
from tests.report.small_runs import run


class Page(HTMLParser):
    """Tags of a page, whether they close, and where they point."""

    VOID = frozenset({"meta", "link"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.targets += [v or "" for k, v in attrs if k in ("href", "src", "action", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_html_is_whole_and_asks_nobody_for_anything(report: ProfilerReport, tmp_path: Path) -> None:
    report.to_html(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert not page.open, "every tag is closed"
    assert page.targets == ["data:,"]
    assert "script" not in page.tags
    assert not re.search(r"https?:|@import|url\(", text)
    assert page.tags.count("svg") == 9
    assert "nan" not in re.findall(r'="([^"]*)"', text)


def test_the_page_begins_with_what_to_do_and_shows_the_losses(tmp_path: Path) -> None:
    found = run(loss=True).report()
    found.to_html(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    lead = text[text.index('class="lead"') : text.index('class="totals"')]
    assert found.recommendation().split("`")[0].replace("rho", "ρ").split("'")[0] in lead
    assert text.index('class="lead"') < text.index("Loss</figcaption>") < text.index("<table>")
    assert "train_loss" in text
    assert "e+" not in re.sub(r"<style>.*</style>", "", text, flags=re.S)


def test_long_names_stand_whole_in_every_plot(report: ProfilerReport) -> None:
    name = "encoder.layers.11.attention.output_projection.with_a_name_beyond_all_measure"
    rows = [(name, [1.0, 2.0], "3 ms"), ("b", [2.0, 2.0], "4 ms")]
    for plot in (stacked(rows, ("red", "blue")), boxes([(name, [1.0] * 7, "red")], "v")):
        assert f">{name}</text>" in plot
        (room,) = map(float, re.findall(r'textLength="(\d+)"', plot))
        assert room <= 400


def test_the_cost_law_is_drawn_through_its_points_or_not_at_all(report: ProfilerReport) -> None:
    def rows(*points: tuple[int, float]) -> list[LayerRow]:
        return [replace(report[0], width=w, overhead=share) for w, share in points]

    law = fitted_law(rows((64, 0.1), (128, 0.05), (512, 0.0125)))
    assert law == pytest.approx(6.4)
    assert fitted_law(rows((64, 0.1), (128, 0.1), (512, 0.1))) is None
    assert fitted_law(rows((64, 0.1), (64, 0.1))) is None
    assert fitted_law([]) is None


def test_a_broken_curve_is_drawn_as_far_as_it_goes() -> None:
    points = [(0, 1.0), (1, 2.0), (2, math.inf), (3, math.nan)]
    plot = lines([Line("loss", points, "red")], Axis("step"), Axis("loss"))
    assert "nan" not in plot
    assert "inf" not in plot
    assert len(re.search(r'points="([^"]*)"', plot)[1].split()) == 2


def test_notebooks_show_the_page_in_a_frame_and_plans_as_tables(report: ProfilerReport) -> None:
    frame = Page()
    frame.feed(report._repr_html_())
    assert frame.tags == ["iframe"]
    assert not frame.open
    assert "&lt;!DOCTYPE html&gt;" in report._repr_html_()
    plan = neurms.memory_report(nn.ModuleDict({"<b>": nn.Linear(4, 3)}), "racs")
    table = Page()
    table.feed(plan._repr_html_())
    assert not table.open
    assert table.tags.count("tr") == len(plan) + 2
    assert "<b>" not in plan._repr_html_()


def test_two_runs_are_titled_by_their_folders_with_their_losses(tmp_path: Path) -> None:
    for name in ("first/run", "second/run", "third"):
        run(tmp_path / name, loss=True, steps=4)
    first, second, third = (
        ProfilerReport.read(tmp_path / name) for name in ("first/run", "second/run", "third")
    )
    assert names(first, third) == ("run", "third")
    assert names(first, second) == ("first/run", "second/run")
    first.compare_to_html(third, tmp_path / "both.html")
    text, page = (tmp_path / "both.html").read_text(), Page()
    page.feed(text)
    assert not page.open
    assert "<h1>A: run (NeuRMS) against B: third (NeuRMS)</h1>" in text
    assert page.tags.count("svg") == 1, "both losses are in one plot"
    assert text.count("train_loss</li>") == 2


def test_html_escapes_names(tmp_path: Path) -> None:
    model = nn.ModuleDict({"<b>&": nn.Linear(4, 3)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Profiler(model, optimizer, every_n_steps=1, warmup_steps=0) as profiler:
        model["<b>&"](torch.ones(2, 4)).sum().backward()
        optimizer.step()
    profiler.report().to_html(tmp_path / "r.html")
    assert "<b>&<" not in (tmp_path / "r.html").read_text()
    assert "&lt;b&gt;&amp;" in (tmp_path / "r.html").read_text()
