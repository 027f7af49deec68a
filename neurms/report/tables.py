"""A report as rich tables for terminals."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table

from neurms.report.advice import advise
from neurms.report.columns import COLUMNS, profiled, totals
from neurms.report.formats import number, time_text
from neurms.report.rows import LayerRow
from neurms.report.summary import Summary

__all__ = ["LayerTable", "comparison_table", "rich_table"]

_LEFT = ("layer", "shape", "rule", "advice")
_WIDE = (
    "layer", "shape", "rule", "forward", "backward", "reduce", "scale", "update", "bookkeeping",
    "overhead", "law", "rho", "exact", "r_avg", "clipped", "state", "advice",
)  # fmt: skip
_BRIEF = ("layer", "rule", "backward", "reduce", "scale", "overhead", "rho", "advice")
"""The columns of a terminal too narrow for all: the others are in the files and the HTML report."""
_COMPARED = ("time", "overhead", "rho", "state")


class LayerTable:
    """A report's rows as a table of as many columns as the terminal has room for.

    Args:
        report: The report.
    """

    def __init__(self, report: Summary) -> None:
        self.report = report

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        whole = rich_table(self.report)
        room = options.update(width=10 * console.width + 1000)
        fits = Measurement.get(console, room, whole).maximum <= options.max_width
        yield whole if fits else rich_table(self.report, _BRIEF)


def rich_table(report: Summary, columns: Sequence[str] = _WIDE) -> Table:
    """Return the rows as a table, with the run's totals as its caption.

    Args:
        report: The report.
        columns: The names of those to show, in their order.
    """
    title = f"{report.run.header.get('optimizer', '')}: layers"
    table = Table(title=title, caption=_caption(report))
    for name in columns:
        table.add_column(name, justify="left" if name in _LEFT else "right", overflow="fold")
    rules = {advice.layer: advice.rule for advice in advise(report)}
    cells = COLUMNS | {"advice": lambda row: rules[row.layer]}
    for row in report:
        table.add_row(*(cells[name](row) for name in columns))
    return table


def comparison_table(first: Summary, second: Summary) -> Table:
    """Return two runs' rows side by side, matched by layer."""
    names = [report.run.header.get("optimizer", "?") for report in (first, second)]
    table = Table(title=f"A {names[0]} against B {names[1]}")
    table.add_column("layer", overflow="fold")
    for what in _COMPARED:
        table.add_column(f"{what} A", justify="right")
        table.add_column(f"{what} B", justify="right")
    table.add_column("time B/A", justify="right")
    cells: dict[str, Callable[[LayerRow], str]]
    cells = COLUMNS | {"time": lambda row: time_text(row.total_us)}
    ours, theirs = ({row.layer: row for row in report} for report in (first, second))
    for name in dict.fromkeys((*ours, *theirs)):
        pair = ours.get(name), theirs.get(name)
        shown = [cells[what](row) if row else "" for what in _COMPARED for row in pair]
        a, b = pair
        ratio = number(b.total_us / a.total_us if a.total_us else None) if a and b else ""
        table.add_row(name, *shown, ratio or ("only in A" if a else "only in B"))
    table.caption = f"A: {_caption(first)}\nB: {_caption(second)}"
    return table


def _caption(report: Summary) -> str:
    return "; ".join([profiled(report), *(f"{k} {v}" for k, v in totals(report).items())])
