"""The chart of the first screen: loss over steps and over seconds, the state in the legend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from benchmarks.evidence.ledger import Row, rows
from benchmarks.significance import spread
from benchmarks.tables.curves import curve
from benchmarks.tables.naming import label
from neurms.report.formats import bytes_text
from neurms.report.svg import Axis, Line, colour, lines

__all__ = ["TASK", "chart", "described"]

TASK = "contests/text-64"
SHOWN = (
    "P momentum",
    "P",
    "RACS",
    "AdamW, two rates",
    "P average",
    "Muon",
    "AdamW",
    "RMNP",
)
"""The rows, in the order of the palette: AdamW takes its grey, as what all are compared with."""

WIDTH, PANEL, HEIGHT = 800, 400, 250
HEAD, LEGEND_ROW = 36, 25

# Each theme has a ground of its own: an image may be shown on a page of the other theme.
STYLE = """
svg { font: 14.5px system-ui, -apple-system, "Segoe UI", sans-serif; }
.ground { fill: #ffffff; } text { fill: #24292f; } .grid { stroke: #d8dee4; }
.title { font-size: 16px; font-weight: 600; } .quiet { fill: #57606a; }
.label, .tick-x { text-anchor: middle; } .tick-y, .right { text-anchor: end; }
@media (prefers-color-scheme: dark) {
  .ground { fill: #161b22; } text { fill: #e6edf3; } .grid { stroke: #30363d; }
  .quiet { fill: #9da7b1; }
}
"""


def chart(contents: Mapping[str, Any]) -> str:
    """Return the chart as an SVG file's text, empty where there are no curves.

    Args:
        contents: Results files by name; without ``contest_step_text`` there is no panel of seconds.
    """
    if TASK not in contents:
        return ""
    found = _curved(contents[TASK])
    if not found:
        return ""
    times = contents.get("contest_step_text", {}).get("runs", {}).get(TASK.rpartition("/")[2], {})
    panels = [_panel(found, "step", {})]
    if timed := [row for row in found if row.name in times]:
        panels.append(_panel(timed, "seconds", {row.name: times[row.name]["ms"] for row in timed}))
    return _file(found, panels, contents[TASK]["settings"]["design"])


def described(content: Mapping[str, Any]) -> str:
    """Return in a sentence what the chart shows, for those who do not see it."""
    ends = [f"{label(row.name)} {curve(row)[-1][1]:.2f}" for row in _curved(content)]
    return (
        "Validation loss of a small LLaMA over steps and over seconds; at the last point "
        f"{', '.join(ends)}"
    )


def _curved(content: Mapping[str, Any]) -> list[Row]:
    """Return the rows to show that are complete and have curves, the best at the end first."""
    found = [r for r in rows(content) if r.name in SHOWN and r.complete and curve(r)]
    return sorted(found, key=lambda row: curve(row)[-1][1])


def _panel(found: Sequence[Row], unit: str, milliseconds: Mapping[str, float]) -> str:
    series = [
        Line(
            label(row.name),
            [(step * milliseconds.get(row.name, 1e3) / 1e3, loss) for step, loss in curve(row)],
            _colour(row.name),
            "dashed" if row.about["rule"].startswith("adamw") else "line",
        )
        for row in found
    ]
    return lines(series, Axis(unit, bounds=(0.0,)), Axis("validation loss"), HEIGHT)


def _colour(name: str) -> str:
    return colour(SHOWN.index(name), len(SHOWN))


def _file(found: Sequence[Row], panels: Sequence[str], design: Mapping[str, Any]) -> str:
    height = HEAD + HEIGHT + LEGEND_ROW * (len(found) + 1) + 14
    width, seeds = design["details"]["width"], len(design["seeds"])
    said = f"A small LLaMA (width {width}) on English prose, mean of {seeds} seeds"
    parts = [
        f'<rect class="ground" width="{WIDTH}" height="{height}" rx="8"/>',
        f'<text class="title" x="16" y="23">{escape(said)}</text>',
    ]
    for index, panel in enumerate(panels):
        place = f'<svg x="{index * PANEL}" y="{HEAD}" width="{PANEL}" height="{HEIGHT}" '
        parts.append(panel.replace("<svg ", place, 1))
    parts += _legend(found, HEAD + HEIGHT + 16, design)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}">\n<style>{STYLE}</style>\n' + "\n".join(parts)
    ) + "\n</svg>\n"


def _legend(found: Sequence[Row], top: int, design: Mapping[str, Any]) -> list[str]:
    columns = (370, 560)
    heads = zip(columns, (f"test {design['figure'].split(',')[0]}", "optimizer state"), strict=True)
    parts = [f'<text class="quiet right" x="{x}" y="{top}">{escape(t)}</text>' for x, t in heads]
    for index, row in enumerate(found):
        y = top + LEGEND_ROW * (index + 1)
        dash = ' stroke-dasharray="5 4"' if row.about["rule"].startswith("adamw") else ""
        state = "" if row.state_bytes is None else bytes_text(row.state_bytes)
        cells = (f"{spread(row.scores)[0]:.3f}", state)
        parts.append(
            f'<line x1="20" x2="48" y1="{y - 4}" y2="{y - 4}" stroke="{_colour(row.name)}" '
            f'stroke-width="2.5"{dash}/><text x="56" y="{y}">{escape(label(row.name))}</text>'
            + "".join(
                f'<text class="right" x="{x}" y="{y}">{cell}</text>'
                for x, cell in zip(columns, cells, strict=True)
            )
        )
    return parts
