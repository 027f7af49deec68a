"""The demo's figures as one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from neurms.report.svg import Axis, Line, colour, lines

__all__ = ["page"]

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>neurms demo</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root {{ color-scheme: light dark; --ink: #24292f; --ground: #fff; --grid: #d8dee4; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e6edf3; --ground: #161b22; --grid: #3d444d; }}
}}
body {{ font: 16px system-ui, sans-serif; color: var(--ink); background: var(--ground);
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
.plots {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem; }}
svg text {{ fill: var(--ink); font-size: 11px; }} .grid {{ stroke: var(--grid); }}
.label, .tick-x {{ text-anchor: middle; }} .tick-y {{ text-anchor: end; }}
div.wide {{ overflow-x: auto; }} table {{ border-collapse: collapse; margin: 1rem 0; }}
th, td {{ padding: .3rem .7rem; text-align: right; border-bottom: 1px solid var(--grid); }}
th:first-child, td:first-child {{ text-align: left; }}
i {{ display: inline-block; width: 1.4rem; height: .3rem; margin: 0 .5rem .2rem 0; }}
</style></head><body>
<h1>neurms demo</h1>
<p>{introduction}</p>
<div class="plots">{plots}</div>
<div class="wide" tabindex="0" role="region" aria-label="figures"><table>
<thead><tr>{header}</tr></thead><tbody>
{rows}
</tbody></table></div>
<p>{note}</p>
</body></html>
"""

Points = Sequence[tuple[float, float]]


def page(
    introduction: str,
    curves: Mapping[str, Points],
    milliseconds: Sequence[float],
    table: Sequence[Sequence[str]],
    note: str,
) -> str:
    """Return the page.

    Args:
        introduction: What was trained, as plain text.
        curves: (step, validation loss) by the name of a method.
        milliseconds: Of a step, by method.
        table: The header, then a line for each method.
        note: How the figures are to be read, as plain text.
    """
    seconds = [
        [(x * ms / 1e3, y) for x, y in points]
        for points, ms in zip(curves.values(), milliseconds, strict=True)
    ]
    plots = [
        _plot(dict(zip(curves, own, strict=True)), unit)
        for own, unit in ((list(curves.values()), "step"), (seconds, "seconds of training steps"))
    ]
    header, *rows = table
    return _PAGE.format(
        introduction=escape(introduction),
        plots="".join(plots),
        header="".join(f'<th scope="col">{escape(cell)}</th>' for cell in header),
        rows="\n".join(_row(index, row, len(rows)) for index, row in enumerate(rows)),
        note=escape(note),
    )


def _plot(curves: Mapping[str, Points], unit: str) -> str:
    series = [
        Line(name, points, colour(index, len(curves)))
        for index, (name, points) in enumerate(curves.items())
        if points
    ]
    return lines(series, Axis(unit), Axis("validation loss", log=True)) if series else ""


def _row(index: int, row: Sequence[str], count: int) -> str:
    first, *rest = map(escape, row)
    swatch = f'<i style="background: {colour(index, count)}"></i>'
    cells = "".join(f"<td>{cell}</td>" for cell in rest)
    return f'<tr><th scope="row">{swatch}{first}</th>{cells}</tr>'
