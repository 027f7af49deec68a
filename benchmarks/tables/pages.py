"""Every page that is written from results files: where it lies and what it says."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.evidence.old import notice
from benchmarks.harness import RESULTS
from benchmarks.tables import (
    again,
    contests,
    cost,
    headline,
    headline_chart,
    images,
    images_figures,
    planner,
    scale,
    scale_times,
    text_figures,
    text_page,
)
from benchmarks.tables.page import OLDER, SHOWN, older, page

__all__ = ["DOCS", "draw", "pages"]

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FIGURES = DOCS / "results" / "figures"
CHART = "assets/contest.svg"
"""The chart of the first screen, from the folder of the site's pages."""

Content = dict[str, Any]

MADE: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Content]], str]]] = {
    "results.md": (SHOWN, page),
    "results/before.md": (OLDER, older),
    "results/contests.md": (contests.SHOWN, contests.page),
    "results/images.md": (images.NAMES, images.page),
    "results/text.md": (text_page.NAMES, text_page.page),
    "results/scale.md": (("scale",), scale.page),
    "results/scale-times.md": (("scale_times",), scale_times.page),
    "results/cost.md": (cost.NAMES, cost.page),
    "results/again.md": (again.NAMES, again.page),
}
"""Page -> the results files that it may read, and the function that writes it."""

DRAWN: tuple[tuple[tuple[str, ...], Callable[[Path, dict[str, Content]], None]], ...] = (
    (images.NAMES, images_figures.draw),
    (text_figures.NAMES, text_figures.draw),
    (("overhead",), cost.draw),
)
"""Results files and the function that draws figures from them."""


def pages() -> Mapping[Path, str]:
    """Return every page, and the chart of the first screen, by its path."""
    made = {
        DOCS / name: noticed(write(_read(files)), files) for name, (files, write) in MADE.items()
    }
    chosen = {DOCS / "assets" / "planner-data.js": planner.script(_read(planner.NAMES))}
    return made | chosen | _first_screen(_read(headline.NAMES))


def _first_screen(contents: dict[str, Content]) -> dict[Path, str]:
    made = {
        page: headline.replaced(page.read_text(), headline.block(contents, chart))
        for page, chart in ((ROOT / "README.md", f"docs/{CHART}"), (DOCS / "index.md", CHART))
    }
    drawn = headline_chart.chart(contents)
    return {**made, DOCS / CHART: drawn} if drawn else made


def noticed(text: str, files: tuple[str, ...]) -> str:
    """Return a page that says below its title which of its files are under the old rules."""
    title, rest = text.split("\n", 1)
    said = notice(files)
    return f"{title}\n\n{said}{rest}" if said else text


def draw() -> None:
    """Draw every figure."""
    for files, plot in DRAWN:
        plot(FIGURES, _read(files))


def _read(names: tuple[str, ...]) -> dict[str, Content]:
    """Return the results files that there are, by name."""
    paths = {name: RESULTS / f"{name}.json" for name in names}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.is_file()}
