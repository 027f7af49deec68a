"""A report as rich tables for terminals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from neurms.report.columns import cells, profiled, totals
from neurms.report.comparison import compared_layers, compared_totals, title
from neurms.report.summary import Summary

__all__ = ["ComparisonTable", "LayerTable", "rich_table"]

_LEFT = ("whole run", "layer", "shape", "rule", "advice")
_WIDE = (
    "layer", "shape", "rule", "forward", "backward", "reduce", "scale", "update", "bookkeeping",
    "overhead", "law", "rho", "exact", "r_avg", "clipped", "state", "advice",
)  # fmt: skip
_SPARED = (
    "law", "exact", "bookkeeping", "update", "forward", "shape", "r_avg", "clipped", "state",
    "backward", "rule", "scale", "reduce",
)  # fmt: skip
"""What goes first where a terminal is narrow: it is in the files and the HTML report."""
_COMPARED = ("time", "overhead", "rho", "state")


class LayerTable:
    """A report's rows as a table of as many columns as the terminal has room for.

    No word is broken: long names of layers are continued on a new line after a dot.

    Args:
        report: The report.
    """

    def __init__(self, report: Summary) -> None:
        self.report = report

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = list(_WIDE)
        sizes = [_fewer(columns, count) for count in range(len(_SPARED) + 1)]
        made = (rich_table(self.report, own, _name_width(options)) for own in sizes)
        yield _first_that_fits(made, console, options)


class ComparisonTable:
    """Two runs' rows side by side, matched by layer, and how their losses went.

    Args:
        first: A.
        second: B.
    """

    def __init__(self, first: Summary, second: Summary) -> None:
        self.first, self.second = first, second

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        whole = _table(("whole run", "A", "B"), compared_totals(self.first, self.second))
        whole.title = title(self.first, self.second)
        yield whole
        sizes = (_COMPARED[:count] for count in range(len(_COMPARED), 0, -1))
        pairs = (compared_layers(self.first, self.second, shared) for shared in sizes)
        made = (_table(head, rows, _name_width(options)) for head, rows in pairs)
        yield _first_that_fits(made, console, options)


def rich_table(
    report: Summary, columns: Sequence[str] = _WIDE, name_width: int | None = None
) -> Table:
    """Return the rows as a table, with the run's totals as its caption.

    Args:
        report: The report.
        columns: The names of those to show, in their order.
        name_width: Letters of a layer's name on one line; None for all of them.
    """
    table = _table(columns, cells(report, columns), name_width)
    table.title = f"{report.run.header.get('optimizer', '')}: layers"
    found = [profiled(report), *(f"{k} {v}" for k, v in totals(report).items())]
    # Numbers stay with their units.
    table.caption = "; ".join(part.replace(" ", "\u00a0") for part in found)
    return table


def _table(
    head: Sequence[str], rows: Sequence[Sequence[str]], name_width: int | None = None
) -> Table:
    table = Table()
    for name in head:
        left = name in _LEFT
        # A column of both runs is as narrow as its numbers: A and B stand below its name.
        heading = f"{name[:-2]}\n{name[-1]}" if name.endswith((" A", " B")) else name
        table.add_column(heading, justify="left" if left else "right", no_wrap=True)
    for name, *others in rows:
        table.add_row(Text(_continued(name, name_width)), *map(Text, others))
    return table


def _name_width(options: ConsoleOptions) -> int:
    return 3 * options.max_width // 10


def _fewer(columns: Sequence[str], count: int) -> list[str]:
    return [name for name in columns if name not in _SPARED[:count]]


def _first_that_fits(made: Iterator[Table], console: Console, options: ConsoleOptions) -> Table:
    room = options.update(width=10 * console.width + 1000)
    table = next(made)
    for fewer in made:
        if Measurement.get(console, room, table).maximum <= options.max_width:
            break
        table = fewer
    return table


def _continued(name: str, width: int | None) -> str:
    """Return a name with new lines after dots, so that lines are of ``width`` where that goes."""
    lines = [""]
    for part in name.split(".") if width is not None else ():
        if lines[-1] and width is not None and len(lines[-1]) + len(part) + 1 > width:
            lines.append("")
        lines[-1] += f"{part}."
    return "\n".join(lines).removesuffix(".") or name
