"""From what layers have seen to their second moments and factors, many layers in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neurms.core.ground.spans import span
from neurms.core.structures.base import Moments
from neurms.core.structures.unit_feature import UnitFeatureDiagonal
from neurms.core.unitwise.rule import LossReduction
from neurms.core.unitwise.statistics import PendingSums

__all__ = ["Factors", "Known", "Moved", "Part", "Versions", "moved", "unchanged", "versions"]

Factors = tuple[Tensor, Tensor | None]
Versions = tuple[tuple[Tensor, int], ...]


class Moved(NamedTuple):
    """Second moments, v and perhaps u, as a commit makes them, and the factors that they give."""

    moments: tuple[Tensor, ...]
    factors: Factors


class Part(NamedTuple):
    """One layer's part in a commit.

    Args:
        state: The layer's state; read only.
        pending: What it has seen.
        reduction: How the loss reduces over rows.
        units: m.
        features: n.
        heads: Number of equal runs of units that share one second moment, 0 for none.
    """

    state: Mapping[str, Any]
    pending: PendingSums
    reduction: LossReduction
    units: int
    features: int
    heads: int = 0

    def squares(self) -> Tensor:
        """Return D's sums of squares (k,), one for each second moment: heads are pooled."""
        units = self.pending.units
        assert units is not None
        return units.reshape(self.heads, -1).mean(-1) if self.heads else units

    def expanded(self, s: Tensor, c: Tensor | None) -> Factors:
        """Return factors by unit where heads share them."""
        return (s.repeat_interleave(self.units // self.heads), c) if self.heads else (s, c)

    def means(self) -> Moments:
        """Return the mean squares of D and H over rows, None where nothing was seen."""
        seen = self.pending.moments(self.reduction)
        if not self.heads or seen.units is None:
            return seen
        return Moments(seen.units.reshape(self.heads, -1).mean(-1), seen.features)

    def last(self, key: str, like: Tensor) -> Tensor:
        """Return a second moment of the state, zero before the first commit."""
        known: Tensor | None = self.state.get(key)
        return torch.zeros_like(like) if known is None else known


def moved(structure: UnitFeatureDiagonal, parts: Sequence[Part], backend: str) -> list[Moved]:
    """Return what committing all parts now would give; nothing changes.

    Args:
        structure: The settings, the same for all.
        parts: Layers that have seen rows of D.
        backend: How kernels run.
    """
    if not parts:
        return []
    steps = [part.state.get("step", 0) + 1 for part in parts]
    squares = [part.squares() for part in parts]
    weights = [part.pending.unit_weight(part.reduction) for part in parts]
    last = [part.last("v", own) for part, own in zip(parts, squares, strict=True)]
    with span("scale"):
        v, s = structure.moved(last, squares, weights, steps, backend)
        u, c = _moved_features(structure, parts, steps, backend)
    return [
        Moved((one,) if other is None else (one, other), part.expanded(left, right))
        for part, one, other, left, right in zip(parts, v, u, s, c, strict=True)
    ]


def _moved_features(
    structure: UnitFeatureDiagonal, parts: Sequence[Part], steps: Sequence[int], backend: str
) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
    nothing: list[Tensor | None] = [None] * len(parts)
    if not structure.factored:
        return nothing, nothing
    # A layer that saw no rows of H, in an empty batch, weighs none: its u stays.
    rows = [part.pending.feature_rows for part in parts]
    sizes = [part.features for part in parts]
    squares = [
        part.squares().new_zeros(size) if part.pending.features is None else part.pending.features
        for part, size in zip(parts, sizes, strict=True)
    ]
    last: list[Any] = [part.last("u", own) for part, own in zip(parts, squares, strict=True)]
    weights = [1.0 / count if count else 0.0 for count in rows]
    u: list[Any]
    c: list[Any]
    u, c = structure.moved(last, squares, weights, steps, backend, features=True)
    for index, count in enumerate(rows):
        if not count:
            state = {"v": last[index], "u": last[index]}
            u[index] = last[index]
            scale = structure.factors(state, steps[index])[1]
            assert scale is not None
            c[index] = scale
    return u, c


class Known(NamedTuple):
    """Factors, and the statistics and settings that they were made of."""

    structure: UnitFeatureDiagonal
    step: int
    made_of: Versions
    factors: Factors

    @classmethod
    def of(
        cls, structure: UnitFeatureDiagonal, state: Mapping[str, Any], factors: Factors
    ) -> Known:
        """Return the factors of a layer's present state."""
        return cls(structure, state["step"], versions(state), factors)

    def holds(self, structure: UnitFeatureDiagonal, state: Mapping[str, Any]) -> bool:
        """Return whether they are still those of ``state``: nothing was written or replaced."""
        same = self.structure is structure and self.step == state["step"]
        return same and unchanged(self.made_of, state)


def versions(state: Mapping[str, Any]) -> Versions:
    """Return a state's second moments, with how often each has been written."""
    v, u = state["v"], state.get("u")
    seen = (v, v._version)
    return (seen,) if u is None else (seen, (u, u._version))


def unchanged(made_of: Versions, state: Mapping[str, Any]) -> bool:
    """Return whether a state still has these second moments, unwritten since."""
    now = versions(state)
    if len(made_of) != len(now):
        return False
    for (tensor, version), (other, other_version) in zip(made_of, now, strict=True):
        if tensor is not other or version != other_version:
            return False
    return True
