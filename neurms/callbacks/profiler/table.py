"""A report as rich tables for terminals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table

from neurms.callbacks.profiler.formats import bytes_text, number, percent, time_text

if TYPE_CHECKING:
    from neurms.callbacks.profiler.report import ProfilerReport

__all__ = ["LayerTable", "comparison_table", "rich_table"]

_COLUMNS = (
    "layer",
    "shape",
    "rule",
    "forward",
    "backward",
    "reduce",
    "scale",
    "update",
    "bookkeeping",
    "overhead",
    "law",
    "rho",
    "of",
    "r_avg",
    "clipped",
    "state",
    "advice",
)
_BRIEF = ("layer", "rule", "backward", "reduce", "scale", "overhead", "rho", "advice")
"""The columns of a terminal too narrow for all: the others are in the files and the HTML report."""


class LayerTable:
    """A report's rows as a table of as many columns as the terminal has room for.

    Args:
        report: The report.
    """

    def __init__(self, report: ProfilerReport) -> None:
        self.report = report

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        whole = rich_table(self.report)
        room = options.update(width=10 * console.width + 1000)
        fits = Measurement.get(console, room, whole).maximum <= options.max_width
        yield whole if fits else rich_table(self.report, _BRIEF)


def rich_table(report: ProfilerReport, columns: Sequence[str] = _COLUMNS) -> Table:
    """Return the rows as a table, with the run's totals as its caption.

    Args:
        report: The report.
        columns: The names of those to show, in their order.
    """
    table = Table(title=f"{report.run.header.get('optimizer', '')}: layers", caption=totals(report))
    for name in columns:
        left = name in ("layer", "shape", "rule", "advice")
        table.add_column(name, justify="left" if left else "right", overflow="fold")
    for row, advice in zip(report, report.advice(), strict=True):
        cells = (
            row.layer,
            "x".join(map(str, row.shape)),
            row.rule,
            *(time_text(getattr(row, f"{part}_us")) for part in _COLUMNS[3:9]),
            percent(row.overhead),
            percent(row.predicted_overhead),
            number(row.rho),
            number(row.rho_ceiling),
            number(row.dominance.r_avg if row.dominance else None),
            "" if row.clipped_units is None else f"{row.clipped_units}/{row.units}",
            bytes_text(row.state_bytes),
            advice.rule,
        )
        shown = dict(zip(_COLUMNS, cells, strict=True))
        table.add_row(*(shown[name] for name in columns))
    return table


def comparison_table(first: ProfilerReport, second: ProfilerReport) -> Table:
    """Return two runs' rows side by side, matched by layer."""
    names = [report.run.header.get("optimizer", "?") for report in (first, second)]
    table = Table(title=f"A {names[0]} against B {names[1]}")
    table.add_column("layer", overflow="fold")
    for what in ("time A", "time B", "B/A", "overhead A", "overhead B", "rho A", "rho B"):
        table.add_column(what, justify="right")
    for what in ("state A", "state B"):
        table.add_column(what, justify="right")
    others = {row.layer: row for row in second}
    for row in first:
        other = others.pop(row.layer, None)
        if other is None:
            table.add_row(row.layer, time_text(row.total_us), "only in A")
            continue
        table.add_row(
            row.layer,
            time_text(row.total_us),
            time_text(other.total_us),
            number(other.total_us / row.total_us if row.total_us else None),
            percent(row.overhead),
            percent(other.overhead),
            number(row.rho),
            number(other.rho),
            bytes_text(row.state_bytes),
            bytes_text(other.state_bytes),
        )
    for name, other in others.items():
        table.add_row(name, "only in B", time_text(other.total_us))
    table.caption = f"A: {totals(first)}\nB: {totals(second)}"
    return table


def totals(report: ProfilerReport) -> str:
    """Return the run's totals in one line."""
    parts = [
        f"{len(report.steps)} of {report.run.totals.get('steps', '?')} steps profiled",
        f"step {number(report.step_ms)} ms",
        f"a profiled one costs {number(report.profiler_ms)} ms more",
        f"{number(report.samples_per_second)} samples/s",
        f"overhead {percent(report.overhead)}, with bookkeeping "
        f"{percent(report.overhead_with_bookkeeping)}",
        f"mean rho {number(report.rho)}",
        f"state {bytes_text(report.state_bytes)}",
        f"resident {bytes_text(report.rss_bytes)}, peak {bytes_text(report.peak_rss_bytes)}",
    ]
    return "; ".join(parts)
