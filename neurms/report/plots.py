"""Which plots a report shows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TypeAlias

from neurms.report.advice import HOLDS
from neurms.report.curves import curve_groups
from neurms.report.formats import bytes_text, number
from neurms.report.rows import LayerRow
from neurms.report.summary import Summary
from neurms.report.svg import Axis, Line, boxes, colour, lines, stacked

__all__ = ["Figure", "curve_figures", "figures", "fitted_law"]

Points: TypeAlias = Sequence[tuple[float, float]]
Figure: TypeAlias = tuple[str, str, str]
"""Title, plot and legend, and what one should know about it."""

SHOWN = 40
"""Layers in one plot of bars; more are left to the table."""

NEAR = 1.5
"""Factor within which layers follow a law for its line to be drawn."""

_PARTS = ("forward", "backward", "reduce", "scale", "update", "bookkeeping")
_PART_COLOURS = ("#56b4e9", "#0072b2", "#e69f00", "#d55e00", "#999999", "#f0e442")


def figures(report: Summary) -> list[Figure]:
    """Return every plot that the report has numbers for."""
    found = [
        *curve_figures(report.run.logged),
        _over_time(report, "rho", "ρ", "Faithfulness ρ during training", _RHO),
        _share_of_expected(report),
        _over_time(report, "factorization_error", "error", "Error of the factorisation", _ERROR),
        _overhead(report),
        _time_split(report),
        _levels(report, "unit_levels", "v: mean square of the error signal", "Units"),
        _levels(report, "feature_levels", "u: mean square of the input", "Features"),
        _dominance(report),
        _memory(report),
    ]
    return [figure for figure in found if figure is not None]


def fitted_law(rows: Sequence[LayerRow]) -> float | None:
    """Return a of the law overhead = a / min(m, n), fitted in logarithms.

    None where it is no law: fewer than two widths, or a layer further from it than ``NEAR`` times.
    """
    logs = [math.log(row.overhead * row.width) for row in rows if row.overhead > 0]
    if len({row.width for row in rows if row.overhead > 0}) < 2:
        return None
    middle = statistics.fmean(logs)
    near = all(abs(value - middle) <= math.log(NEAR) for value in logs)
    return math.exp(middle) if near else None


def curve_figures(logged: Mapping[str, Points]) -> list[Figure]:
    """Return a plot of each thing that was logged, losses first."""
    found = []
    for what, curves in curve_groups(logged).items():
        series = [
            Line(name, points, colour(index, len(curves)))
            for index, (name, points) in enumerate(curves.items())
        ]
        values = [value for points in curves.values() for _, value in points]
        steep = min(values) > 0 and max(values) > _STEEP * min(values)
        plot = lines(series, Axis("step"), Axis(what, log=steep))
        found.append((what[:1].upper() + what[1:], plot + _legend(series), ""))
    return found


_STEEP = 50.0
"""Quotient of a curve's ends from which on its axis is logarithmic."""


_RHO = (
    "corr(G², v uᵀ), one line for each layer. One gradient is noise around E[G²]: even exact "
    "factors typically show no more than 1/√3 = 0.58; small layers scatter around that."
)
_ERROR = (
    "‖E[d²h²] - E[d²]E[h²]‖ / ‖E[d²h²]‖ on the rows themselves: 0 where a row's error and its "
    "input are unrelated in size."
)


def _per_layer(report: Summary, points_of: Callable[[str], Points]) -> list[Line]:
    """Return a line for each layer that has points."""
    found = (
        Line(row.layer, points_of(row.layer), colour(index, len(report)))
        for index, row in enumerate(report)
    )
    return [line for line in found if line.points]


def _over_time(report: Summary, key: str, label: str, title: str, note: str) -> Figure | None:
    series = _per_layer(report, lambda layer: report.history(layer, key))
    if not series:
        return None
    most = max(value for line in series for _, value in line.points)
    # A quotient whose divisor is next to nothing would flatten all the others.
    axis = Axis(label, log=True) if most > _STEEP else Axis(label, bounds=(0.0,))
    plot = lines(series, Axis("step"), axis)
    return title, plot + _legend(series), note


def _share_of_expected(report: Summary) -> Figure | None:
    def shares(layer: str) -> Points:
        expected = dict(report.history(layer, "rho_expected"))
        rho = report.history(layer, "rho")
        return [(step, value / expected[step]) for step, value in rho if expected.get(step)]

    series = _per_layer(report, shares)
    if not series:
        return None
    steps = [p[0] for line in series for p in line.points]
    limit = Line("taken to hold", [(min(steps), HOLDS), (max(steps), HOLDS)], "#888888", "dashed")
    plot = lines([*series, limit], Axis("step"), Axis("ρ / ρ of exact factors", bounds=(0.0, 1.0)))
    note = (
        "ρ as a share of what exact factors would typically show for these v and u; single "
        f"gradients scatter around it. Above the dashed line ({HOLDS}) the advice takes the "
        "factorisation to hold."
    )
    return "ρ against that of exact factors", plot + _legend([*series, limit]), note


def _overhead(report: Summary) -> Figure | None:
    rows = [row for row in report if row.overhead > 0]
    if not rows:
        return None
    series = [
        Line(row.layer, [(row.width, 100 * row.overhead)], colour(index, len(report)), "points")
        for index, row in enumerate(report)
        if row.overhead > 0
    ]
    law, widths = fitted_law(rows), sorted({row.width for row in rows})
    note = "(reduce + scale) / the layer's time. "
    if law is None:
        note += "The cost law, ∝ 1/min(m, n), is not seen in these layers: no line is drawn."
    else:
        ends = [(w, 100 * law / w) for w in (widths[0], widths[-1])]
        series.append(Line(f"{number(law)} / min(m, n)", ends, "#888888", "dashed"))
        note += "The cost law says ∝ 1/min(m, n); dashed: its fit."
    plot = lines(series, Axis("min(m, n)", log=True), Axis("overhead in %", log=True))
    return "Overhead against width", plot + _legend(series), note


def _time_split(report: Summary) -> Figure:
    rows = []
    for row in report[:SHOWN]:
        parts = [getattr(row, f"{part}_us") / 1e3 for part in _PARTS]
        rows.append((row.layer, parts, f"{number(sum(parts))} ms"))
    legend = [Line(p, [], c) for p, c in zip(_PARTS, _PART_COLOURS, strict=True)]
    note = "Milliseconds of a step, medians. " + _left_out(report)
    return "Where the time goes", stacked(rows, _PART_COLOURS) + _legend(legend), note


def _levels(report: Summary, key: str, label: str, what: str) -> Figure | None:
    rows = [
        (row.layer, getattr(row, key), colour(index, len(report)))
        for index, row in enumerate(report)
        if getattr(row, key) is not None and max(getattr(row, key)) > 0
    ]
    if not rows:
        return None
    note = f"{what} at the last profiled step: all, 5–95 %, 25–75 %, median. " + _left_out(report)
    return f"Distribution of {label[0]}", boxes(rows[:SHOWN], label), note


def _dominance(report: Summary) -> Figure | None:
    def averages(layer: str) -> Points:
        seen = (
            (s["step"], s["layers"].get(layer, {}).get("dominance")) for s in report.run.samples
        )
        return [(int(step), float(r[0])) for step, r in seen if r and math.isfinite(r[0])]

    series = _per_layer(report, averages)
    if not series:
        return None
    plot = lines(series, Axis("step"), Axis("r_avg", log=True, bounds=(1.0,)))
    note = (
        "Mean of r_i = |V Vᵀ|ᵢᵢ / mean|V Vᵀ|ᵢⱼ of the momentum: RMNP's premise is that it is large."
    )
    return "Dominance of the rows", plot + _legend(series), note


def _memory(report: Summary) -> Figure | None:
    forecast = report.run.totals.get("memory") or {}
    found = sorted(forecast.items(), key=lambda entry: entry[1])
    measured = report.state_bytes
    if measured is not None:
        found.insert(0, (f"{report.run.header.get('optimizer', 'this run')}, measured", measured))
    if not found:
        return None
    # Two parts, one of which is empty: what was measured has a colour of its own.
    parts = [(0.0, float(v)) if name in forecast else (float(v), 0.0) for name, v in found]
    rows = [(name, p, bytes_text(sum(p))) for (name, _), p in zip(found, parts, strict=True)]
    note = "Optimizer state of this model, as predicted for default settings."
    return "Memory by optimizer", stacked(rows, ("#d55e00", "#56b4e9")), note


def _legend(series: Sequence[Line]) -> str:
    entries = "".join(
        f'<li><i style="background:{line.colour}"></i>{escape(line.name)}</li>' for line in series
    )
    many = len(series) > 10
    body = f'<ul class="legend">{entries}</ul>'
    return f"<details><summary>{len(series)} lines</summary>{body}</details>" if many else body


def _left_out(report: Summary) -> str:
    more = len(report) - SHOWN
    return f"{more} more layers are in the table." if more > 0 else ""
