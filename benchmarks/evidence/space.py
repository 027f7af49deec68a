"""What a search may try: rates on a lattice without ends, other settings from ordered levels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["FINENESS", "Axis", "Point", "Space", "levels", "rate"]

Point = tuple[int, ...]

FINENESS = 4
"""Lattice steps to a factor of two in a rate."""


@dataclass(frozen=True)
class Axis:
    """One setting of a search.

    Args:
        start: Where the search begins.
        choices: The ordered values to choose from; empty for a rate, whose lattice has no ends.
    """

    start: float
    choices: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.choices and self.start not in self.choices:
            raise ValueError(f"start={self.start!r} must be one of choices={self.choices}")

    @property
    def origin(self) -> int:
        """The index of the start."""
        return self.choices.index(self.start) if self.choices else 0

    def value(self, index: int) -> float:
        """Return the value at an index, of a rate to three digits."""
        if self.choices:
            return self.choices[index]
        return float(f"{self.start * 2 ** (index / FINENESS):.3g}")

    def moved(self, index: int, sign: int, stride: int) -> int | None:
        """Return the neighbour's index, None beyond the last level; levels are not skipped."""
        if not self.choices:
            return index + sign * stride
        return index + sign if 0 <= index + sign < len(self.choices) else None


@dataclass(frozen=True)
class Space:
    """The settings that a search varies, by name; earlier ones are looked at first."""

    axes: Mapping[str, Axis]

    @property
    def origin(self) -> Point:
        """Where the search begins."""
        return tuple(axis.origin for axis in self.axes.values())

    def values(self, point: Point) -> dict[str, float]:
        """Return the settings at a point."""
        return {
            name: axis.value(index)
            for (name, axis), index in zip(self.axes.items(), point, strict=True)
        }

    def begun_at(self, values: Mapping[str, float]) -> Space:
        """Return the same space with the search beginning at these values."""
        return Space({name: Axis(values[name], axis.choices) for name, axis in self.axes.items()})

    def moved(self, point: Point, axis: int, sign: int, stride: int) -> Point | None:
        """Return the neighbour along one axis, None where levels end."""
        index = list(self.axes.values())[axis].moved(point[axis], sign, stride)
        return None if index is None else (*point[:axis], index, *point[axis + 1 :])


def rate(start: float) -> Axis:
    """Return the axis of a learning rate."""
    return Axis(start)


def levels(start: float, *choices: float) -> Axis:
    """Return the axis of a setting with these values, ascending."""
    return Axis(start, choices)
