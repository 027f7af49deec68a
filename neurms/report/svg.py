"""Plots as inline SVG: no library, no script, no network, sharp in print."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from neurms.report.formats import number, raised

__all__ = ["Axis", "Line", "boxes", "colour", "lines", "stacked"]

WIDTH = 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 14, 10, 38
_ROW, _BAR = 36, 13
_LETTER = 6.6
"""Width of a letter of the labels, about."""
# Okabe and Ito's palette, readable with every kind of colour vision.
_PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8b5a2b")


@dataclass(frozen=True)
class Line:
    """A named series of points; ``style`` is ``"line"``, ``"dashed"`` or ``"points"``."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str
    style: str = "line"


@dataclass
class Axis:
    """One axis: its label, whether it is logarithmic, and bounds that it must hold."""

    label: str
    log: bool = False
    bounds: tuple[float, ...] = ()
    low: float = field(default=0.0, init=False)
    high: float = field(default=1.0, init=False)

    def fit(self, values: Sequence[float]) -> None:
        """Set the range to that of the values."""
        found = [self._map(v) for v in (*values, *self.bounds) if not self.log or v > 0]
        self.low, self.high = (min(found), max(found)) if found else (0.0, 1.0)
        if self.low == self.high:
            self.low, self.high = self.low - 0.5, self.high + 0.5

    def place(self, value: float) -> float:
        """Return where a value lies, 0 at the low end and 1 at the high one."""
        return (self._map(value) - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Return round values within the range."""
        if self.log:
            return _log_ticks(self.low, self.high)
        step = _round_step((self.high - self.low) / 4)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def _map(self, value: float) -> float:
        return math.log10(value) if self.log else value


def colour(index: int, count: int) -> str:
    """Return the colour of series ``index`` of ``count``: a palette, for many a ramp by depth."""
    if count <= len(_PALETTE):
        return _PALETTE[index]
    part = index / (count - 1)
    return f"hsl({230 - 210 * part:.0f} 70% {40 + 8 * math.sin(math.pi * part):.0f}%)"


def lines(series: Sequence[Line], x: Axis, y: Axis, height: int = 230) -> str:
    """Return a plot of lines or points over two axes."""
    points = [p for line in series for p in line.points if _shown(p[1], y)]
    x.fit([p[0] for p in points])
    y.fit([p[1] for p in points])
    parts = [_frame(x, y, height)]
    for line in series:
        placed = [_at(x.place(a), y.place(b), height) for a, b in line.points if _shown(b, y)]
        title = f"<title>{escape(line.name)}</title>"
        if line.style == "points":
            dots = "".join(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5"/>' for a, b in placed)
            parts.append(f'<g fill="{line.colour}">{title}{dots}</g>')
            continue
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in placed)
        dash = ' stroke-dasharray="5 4"' if line.style == "dashed" else ""
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{line.colour}" stroke-width="1.8"'
            f'{dash} stroke-linejoin="round">{title}</polyline>'
        )
        if len(placed) == 1:
            (a, b) = placed[0]
            parts.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{line.colour}"/>')
    return _svg(height, parts, f"{y.label} against {x.label}")


def stacked(rows: Sequence[tuple[str, Sequence[float], str]], colours: Sequence[str]) -> str:
    """Return horizontal bars of (name, parts, what stands at the end of the bar's title)."""
    most = max((sum(parts) for _, parts, _ in rows), default=0.0) or 1.0
    body = []
    for position, (name, parts, text) in enumerate(rows):
        top = position * _ROW
        body.append(_row_label(name, top, WIDTH - _LETTER * len(text) - 12))
        body.append(f'<text x="{WIDTH}" y="{top + 13}" class="tick-y">{escape(text)}</text>')
        left = 0.0
        for part, fill in zip(parts, colours, strict=True):
            wide = max(part / most * WIDTH, 0.0)
            body.append(
                f'<rect x="{left:.1f}" y="{top + 18}" width="{wide:.1f}" height="{_BAR}" '
                f'fill="{fill}"/>'
            )
            left += wide
    return _svg(len(rows) * _ROW + 4, body, "bars")


def boxes(rows: Sequence[tuple[str, Sequence[float], str]], label: str) -> str:
    """Return boxes of (name, the quantiles 0, .05, .25, .5, .75, .95, 1, colour), logarithmic."""
    x = Axis(label, log=True)
    x.fit([q for _, levels, _ in rows for q in levels if q > 0])
    room, height = WIDTH - 2 * _RIGHT, len(rows) * _ROW + _BOTTOM + 4

    def at(value: float) -> float:
        # Zeros (dead units) have no logarithm; they stand at the left edge.
        return _RIGHT + (x.place(value) if value > 0 else 0.0) * room

    body = []
    for tick in x.ticks():
        body.append(_grid_x(at(tick), 0, height - _BOTTOM + 4, _tick(tick)))
    for position, (name, levels, fill) in enumerate(rows):
        body.append(_row_label(name, position * _ROW, WIDTH))
        body.append(_box([at(level) for level in levels], position * _ROW + 18, fill))
    body.append(f'<text x="{WIDTH / 2}" y="{height - 4}" class="label">{escape(label)}</text>')
    return _svg(height, body, label)


def _box(places: Sequence[float], top: int, fill: str) -> str:
    middle = top + _BAR / 2
    return (
        f'<line x1="{places[0]:.1f}" x2="{places[6]:.1f}" y1="{middle}" y2="{middle}" '
        f'stroke="{fill}"/><rect x="{places[1]:.1f}" y="{middle - 3}" height="6" '
        f'width="{max(places[5] - places[1], 1):.1f}" fill="{fill}" opacity=".45"/>'
        f'<rect x="{places[2]:.1f}" y="{top}" width="{max(places[4] - places[2], 1):.1f}" '
        f'height="{_BAR}" fill="{fill}"/><line x1="{places[3]:.1f}" x2="{places[3]:.1f}" '
        f'y1="{top - 2}" y2="{top + _BAR + 2}" class="median"/>'
    )


def _svg(height: int, parts: Sequence[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">'
        + "".join(parts)
        + "</svg>"
    )


def _at(x: float, y: float, height: int) -> tuple[float, float]:
    wide, tall = WIDTH - _LEFT - _RIGHT, height - _TOP - _BOTTOM
    return _LEFT + x * wide, _TOP + (1 - y) * tall


def _shown(value: float, axis: Axis) -> bool:
    return math.isfinite(value) and (value > 0 or not axis.log)


def _frame(x: Axis, y: Axis, height: int) -> str:
    parts = []
    for tick in x.ticks():
        parts.append(_grid_x(_at(x.place(tick), 0, height)[0], _TOP, height - _BOTTOM, _tick(tick)))
    for tick in y.ticks():
        level = _at(0, y.place(tick), height)[1]
        parts.append(
            f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{level:.1f}" y2="{level:.1f}" '
            f'class="grid"/>'
            f'<text x="{_LEFT - 5}" y="{level + 4:.1f}" class="tick-y">{_tick(tick)}</text>'
        )
    middle = _TOP + (height - _TOP - _BOTTOM) / 2
    parts.append(
        f'<text x="{(WIDTH + _LEFT) / 2}" y="{height - 5}" class="label">{escape(x.label)}</text>'
        f'<text transform="translate(11 {middle}) rotate(-90)" class="label">'
        f"{escape(y.label)}</text>"
    )
    return "".join(parts)


def _tick(value: float) -> str:
    """Return a tick's number, short: a power of ten beyond five digits, without its 1."""
    if value and not 1e-3 <= abs(value) < 1e5:
        digits, power = f"{value:.1e}".split("e")
        lead = "" if digits == "1.0" else f"{digits.removesuffix('.0')}·"
        return f"{lead}10{raised(int(power))}"
    return number(value)


def _grid_x(place: float, top: float, bottom: float, text: str) -> str:
    return (
        f'<line x1="{place:.1f}" x2="{place:.1f}" y1="{top}" y2="{bottom}" class="grid"/>'
        f'<text x="{place:.1f}" y="{bottom + 14}" class="tick-x">{escape(text)}</text>'
    )


def _row_label(name: str, top: int, room: float) -> str:
    # A whole name, on a line of its own: narrower letters rather than a cut.
    fitted = ""
    if len(name) * _LETTER > room:
        fitted = f' textLength="{room:.0f}" lengthAdjust="spacingAndGlyphs"'
    return f'<text x="0" y="{top + 13}"{fitted}>{escape(name)}</text>'


def _round_step(raw: float) -> float:
    power = 10.0 ** math.floor(math.log10(raw))
    return next(power * f for f in (1, 2, 2.5, 5, 10) if power * f >= raw * (1 - 1e-9))


def _log_ticks(low: float, high: float) -> list[float]:
    every = max(1, math.ceil((high - low) / 5))
    powers = [10.0**p for p in range(math.ceil(low), math.floor(high) + 1) if p % every == 0]
    if len(powers) >= 2:
        return powers
    fine = [f * 10.0**p for p in range(math.floor(low), math.ceil(high) + 1) for f in (1, 2, 5)]
    return [v for v in fine if low - 1e-9 <= math.log10(v) <= high + 1e-9] or [
        10.0**low,
        10.0**high,
    ]
