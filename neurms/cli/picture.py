"""Curves drawn in a terminal: dots of Braille patterns, or letters where there are none."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich.text import Text

__all__ = ["COLOURS", "Curve", "picture"]

COLOURS = (
    *("bright_black", "white", "yellow", "magenta"),
    *("cyan", "green", "bright_red", "bright_blue"),
)
"""Rich's colours by the number of a curve."""

# The dots of a Braille cell, from its upper left one down, as bits of its character.
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))

Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """A named line through points of ascending abscissa."""

    name: str
    points: Sequence[Point]


def picture(
    curves: Sequence[Curve], *, width: int = 60, height: int = 14, letters: bool = False
) -> Text:
    """Return curves over a common frame, the first one drawn first, with their names below.

    Args:
        curves: What to draw; a curve without points has its name alone.
        width: Columns of the frame.
        height: Lines of the frame.
        letters: Draw with the letters a, b, ... and without Braille and colours' help.
    """
    points = [p for curve in curves for p in curve.points]
    if not points:
        return Text("no curve: no run stayed finite")
    low, high = _range(curves)
    right = max(x for x, _ in points)
    left = min(x for x, _ in points)
    owner: dict[tuple[int, int], int] = {}
    bits: dict[tuple[int, int], int] = {}
    for index, curve in enumerate(curves):
        for x, y in _sampled(curve.points, left, right, 2 * width):
            if low <= y <= high:
                row = round((high - y) / (high - low or 1.0) * (4 * height - 1))
                cell = (row // 4, x // 2)
                bits[cell] = (bits.get(cell, 0) if owner.get(cell) == index else 0) | _DOTS[
                    row % 4
                ][x % 2]
                owner[cell] = index
    return _assembled(curves, owner, bits, (low, high, right), (width, height), letters)


def _range(curves: Sequence[Curve]) -> tuple[float, float]:
    """Return the range shown, without a fall at the start that would flatten what follows.

    From a quarter of each curve on, and of that without the highest tenth.
    """
    late = sorted(y for curve in curves for x, y in curve.points if x >= 0.25 * curve.points[-1][0])
    return late[0], late[max(0, math.ceil(0.9 * len(late)) - 1)]


def _sampled(
    points: Sequence[Point], left: float, right: float, columns: int
) -> Iterator[tuple[int, float]]:
    """Yield a column of dots and the height of the line there."""
    for (x1, y1), (x2, y2) in pairwise(points):
        scale = (columns - 1) / ((right - left) or 1.0)
        first, last = round((x1 - left) * scale), round((x2 - left) * scale)
        for column in range(first, last + 1):
            part = (column - first) / max(1, last - first)
            yield column, y1 + part * (y2 - y1)


def _assembled(
    curves: Sequence[Curve],
    owner: dict[tuple[int, int], int],
    bits: dict[tuple[int, int], int],
    ends: tuple[float, float, float],
    size: tuple[int, int],
    letters: bool,
) -> Text:
    (low, high, right), (width, height) = ends, size
    bar, corner, dash = ("|", "+", "-") if letters else ("│", "└", "─")
    text = Text()
    for row in range(height):
        label = f"{high:7.2f}" if row == 0 else f"{low:7.2f}" if row == height - 1 else " " * 7
        text.append(f"{label} {bar}")
        for column in range(width):
            index = owner.get((row, column))
            if index is None:
                text.append(" ")
                continue
            mark = _letter(index) if letters else chr(0x2800 + bits[row, column])
            text.append(mark, style=COLOURS[index % len(COLOURS)])
        text.append("\n")
    text.append(f"{' ' * 7} {corner}{dash * width}\n")
    text.append(f"{' ' * 8}{f'step {right:g}':>{width + 1}}\n")
    for index, curve in enumerate(curves):
        mark = _letter(index) if letters else "━━"
        text.append(f"  {mark} ", style=COLOURS[index % len(COLOURS)])
        text.append(f"{curve.name}\n" if index % 3 == 2 else f"{curve.name:<20}")
    return text


def _letter(index: int) -> str:
    return chr(ord("a") + index % 26)
