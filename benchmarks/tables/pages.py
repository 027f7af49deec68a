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
    images,
    images_figures,
    scale,
    text_figures,
    text_page,
)
from benchmarks.tables.page import PAGE, SHOWN, page

__all__ = ["DOCS", "draw", "pages"]

DOCS = PAGE.parent
FIGURES = DOCS / "results" / "figures"

Content = dict[str, Any]

MADE: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Content]], str]]] = {
    "results/contests.md": (contests.NAMES, contests.page),
    "results/images.md": (images.NAMES, images.page),
    "results/text.md": (text_page.NAMES, text_page.page),
    "results/scale.md": (("scale",), scale.page),
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
    """Return every page by its path."""
    made = {
        DOCS / name: noticed(write(_read(files)), files) for name, (files, write) in MADE.items()
    }
    return {PAGE: noticed(page(), SHOWN), **made}


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
