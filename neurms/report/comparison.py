"""Two runs side by side: names, totals, layers, and a page of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from neurms.report.columns import COLUMNS, totals
from neurms.report.curves import loss_texts
from neurms.report.document import document, table
from neurms.report.formats import number
from neurms.report.html import plots, title_of
from neurms.report.plots import curve_figures
from neurms.report.rows import LayerRow
from neurms.report.summary import Summary

__all__ = ["compared_layers", "compared_totals", "comparison_page", "names", "title"]

_SHARED = ("time", "overhead", "rho", "state")


def names(first: Summary, second: Summary) -> tuple[str, str]:
    """Return what tells two runs apart: their folders' names, with parents where they are alike."""
    paths = [report.run.path for report in (first, second)]
    if first.name != second.name or None in paths:
        return first.name, second.name
    parts = [Path(path).resolve().parts for path in paths if path is not None]
    while len({len(own) for own in parts}) == 1 and len(parts[0]) > 1:
        if parts[0][0] != parts[1][0]:
            break
        parts = [own[1:] for own in parts]
    return "/".join(parts[0]), "/".join(parts[1])


def title(first: Summary, second: Summary) -> str:
    """Return ``A: first (NeuRMS) against B: second (AdamW)``."""
    own = [
        f"{letter}: {name} ({report.run.header.get('optimizer', '?')})"
        for letter, name, report in zip("AB", names(first, second), (first, second), strict=True)
    ]
    return " against ".join(own)


def compared_totals(first: Summary, second: Summary) -> list[tuple[str, str, str]]:
    """Return (what, A, B): how losses went, then time, overhead and memory."""
    found = [
        loss_texts(report.run.logged)
        | {"steps": number(report.run.totals.get("steps"))}
        | totals(report)
        for report in (first, second)
    ]
    a, b = found
    return [(what, a.get(what, "–"), b.get(what, "–")) for what in dict.fromkeys((*a, *b))]


def compared_layers(
    first: Summary, second: Summary, shared: Sequence[str] = _SHARED
) -> tuple[list[str], list[list[str]]]:
    """Return headings and one row of text for each layer of either run.

    Args:
        first: A.
        second: B.
        shared: The columns that both have.
    """
    head = ["layer", *(f"{what} {letter}" for what in shared for letter in "AB"), "time B/A"]
    ours, theirs = ({row.layer: row for row in report} for report in (first, second))
    rows = []
    for name in dict.fromkeys((*ours, *theirs)):
        pair = ours.get(name), theirs.get(name)
        rows.append([name, *_texts(pair, [COLUMNS[what] for what in shared]), _ratio(*pair)])
    return head, rows


def comparison_page(first: Summary, second: Summary) -> str:
    """Return a page with both runs' losses in the same plots, their totals and their layers."""
    both = {
        f"{letter}: {name}": points
        for letter, report in zip("AB", (first, second), strict=True)
        for name, points in report.run.logged.items()
    }
    heading = title(first, second)
    head, rows = compared_layers(first, second)
    return document(
        heading,
        f"""<header>
<h1>{escape(heading)}</h1>
<p class="about">A: {escape(title_of(first))}. B: {escape(title_of(second))}.</p>
</header>
<main>
{table(("whole run", "A", "B"), compared_totals(first, second), "both runs as a whole")}
<h2>Curves</h2>
{plots(curve_figures(both))}
<h2>Layers</h2>
{table(head, rows, "layers of both runs")}
</main>""",
    )


def _texts(
    pair: tuple[LayerRow | None, LayerRow | None], shown: Sequence[Callable[[LayerRow], str]]
) -> list[str]:
    return [text(row) if row is not None else "" for text in shown for row in pair]


def _ratio(a: LayerRow | None, b: LayerRow | None) -> str:
    if a is None or b is None:
        return "only in B" if a is None else "only in A"
    return number(b.total_us / a.total_us if a.total_us else None)
