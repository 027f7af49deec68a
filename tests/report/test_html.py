"""The page: whole, by itself, and safe with any name."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import torch
from torch import nn

from neurms.callbacks.profiler import Profiler
from neurms.report import ProfilerReport


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


def test_html_escapes_names(tmp_path: Path) -> None:
    model = nn.ModuleDict({"<b>&": nn.Linear(4, 3)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Profiler(model, optimizer, every_n_steps=1, warmup_steps=0) as profiler:
        model["<b>&"](torch.ones(2, 4)).sum().backward()
        optimizer.step()
    profiler.report().to_html(tmp_path / "r.html")
    assert "<b>&<" not in (tmp_path / "r.html").read_text()
    assert "&lt;b&gt;&amp;" in (tmp_path / "r.html").read_text()
