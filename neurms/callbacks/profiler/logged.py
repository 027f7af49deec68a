"""What a training logs beside its profile, thinned as it grows: the report's curves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["LoggedValues", "as_number"]

_STAGE = 200
"""Values after which a point is the mean of one value more; the first stages have one each."""

Points = dict[str, list[tuple[int, float]]]


@dataclass(slots=True)
class _Open:
    """A point under way: the sum of some values, on their own device."""

    total: Any
    count: int
    step: int


class LoggedValues:
    """Collects values by name; a curve of n > 400 values has about 200 (1.6 + ln(n / 200)) points.

    Tensors are read when points are taken and not before, so that no step waits for an accelerator.

    Example:
        >>> logged = LoggedValues()
        >>> for step in range(3):
        ...     logged.add("loss", step, 1.0 / (step + 1))
        >>> logged.take()
        {'loss': [(0, 1.0), (1, 0.5), (2, 0.3333333333333333)]}
        >>> logged.take()
        {}
    """

    def __init__(self) -> None:
        self.points: Points = {}
        """All that was taken."""
        self._seen: dict[str, int] = {}
        self._open: dict[str, _Open] = {}
        self._ready: list[tuple[str, _Open]] = []

    def add(self, name: str, step: int, value: Any) -> None:
        """Keep a value; what is no single number is passed over."""
        number = as_number(value)
        if number is None:
            return
        seen = self._seen[name] = self._seen.get(name, 0) + 1
        point = self._open.setdefault(name, _Open(0.0, 0, step))
        point.total, point.count, point.step = point.total + number, point.count + 1, step
        if point.count >= max(1, seen // _STAGE):
            self._ready.append((name, self._open.pop(name)))

    def take(self, *, all_: bool = False) -> Points:
        """Return the points that are new, as numbers.

        Args:
            all_: Whether points under way are ended too.
        """
        if all_:
            self._ready += self._open.items()
            self._open = {}
        new: Points = {}
        for name, point in self._ready:
            new.setdefault(name, []).append((point.step, float(point.total) / point.count))
        self._ready = []
        for name, points in new.items():
            self.points.setdefault(name, []).extend(points)
        return new


def as_number(value: Any) -> Any:
    """Return a number, or a 0-d tensor on its device; None for anything else."""
    if isinstance(value, Tensor):
        single = value.numel() == 1 and not value.is_complex()
        return value.detach().reshape(()).float() if single else None
    return float(value) if isinstance(value, (int, float)) else None
