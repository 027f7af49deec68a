"""Second moments of units and features: summed over backward passes, moved once in a step.

Between two optimizer steps a layer may be back-propagated many times (micro-batches, a module used
twice) and on several ranks. Sums of squares and row counts add up exactly, so that k micro-batches
equal one big batch and the number of ranks does not matter; only the commit turns them into the
means that the moving averages take.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neurms.compiled.moments import move_moments
from neurms.core.ground.ranks import Ranks
from neurms.core.ground.spans import span
from neurms.core.structures.base import Moments
from neurms.core.structures.unit_feature import UnitFeatureDiagonal
from neurms.core.taps.protocol import Sums
from neurms.core.unitwise.rule import LossReduction

__all__ = ["Basis", "Factors", "Moved", "Part", "PendingSums", "moved", "scalar", "synchronize"]

Factors = tuple[Tensor, Tensor | None]
"""s (m,) and c (n,), None for 1."""

_GREATEST = {dtype: torch.finfo(dtype).max for dtype in (torch.float32, torch.float64)}


@dataclass
class PendingSums:
    """Sums of squares of one layer's D and H since the last commit.

    Args:
        units: Sum over rows of d_i^2, shape (m,), or None before the first backward pass.
        features: Sum over rows of h_j^2, shape (n,), or None where H is not observed.
        rows: Rows of D that were summed.
        feature_rows: Rows of H that were summed.
    """

    units: Tensor | None = None
    features: Tensor | None = None
    rows: int = 0
    feature_rows: int = 0

    def add(self, sums: Sums) -> None:
        """Add one backward firing; never writes into what it was given."""
        units, features = sums.unit_square_sum, sums.feature_square_sum
        self.units = units if self.units is None else self.units + units
        if features is not None:
            self.features = features if self.features is None else self.features + features
        self.rows += sums.rows
        self.feature_rows += sums.feature_rows

    def plus(self, sums: Sums) -> PendingSums:
        """Return what these sums would be after :meth:`add`, leaving them as they are."""
        total = self.copy()
        total.add(sums)
        return total

    def copy(self) -> PendingSums:
        """Return the same sums in an object of their own."""
        return PendingSums(self.units, self.features, self.rows, self.feature_rows)

    def clear(self) -> None:
        """Forget everything since the last commit."""
        self.units = self.features = None
        self.rows = self.feature_rows = 0

    def moments(self, reduction: LossReduction) -> Moments:
        """Return the mean squares over rows of the per-row error D and of the input H.

        Args:
            reduction: How the loss reduces over rows.

        Returns:
            ``units`` of shape (m,), ``features`` of shape (n,); None where nothing was summed.
        """
        units = features = None
        if self.units is not None and self.rows:
            units = self.units * self.unit_weight(reduction)
        if self.features is not None and self.feature_rows:
            features = self.features / self.feature_rows
        return Moments(units, features)

    def unit_weight(self, reduction: LossReduction) -> float:
        """Return the weight of D's sum of squares in its mean: N for a mean loss, else 1 / N.

        Autograd's d carries the loss's own mean: for ``"mean"`` the per-row error is D = N d with N
        all rows of the window, so mean(D^2) = N sum d^2; for ``"sum"`` D = d and mean(D^2) =
        sum d^2 / N.
        """
        return float(self.rows) if reduction == "mean" else 1.0 / self.rows

    def greatest(self) -> float:
        """Return what sums may be at most, so that weights leave them far from overflowing.

        An average that has become infinite would be NaN one step later.
        """
        least = math.inf if self.units is None else _GREATEST[self.units.dtype]
        if self.features is not None:
            least = min(least, _GREATEST[self.features.dtype])
        return least / (4.0 * max(self.rows, 1))

    def is_finite(self) -> bool:
        """Return whether neither sum holds a NaN, an infinity or what would become one."""
        greatest = self.greatest()
        return all(
            bool((s <= greatest).all()) for s in (self.units, self.features) if s is not None
        )


@functools.lru_cache(maxsize=1024)
def scalar(value: float) -> Tensor:
    """Return a 0-d float64 tensor, made once for each value; nobody may write it."""
    return torch.tensor(value, dtype=torch.float64, device="cpu")


def synchronize(
    pending: Sequence[PendingSums],
    sizes: Sequence[tuple[int, int]],
    reduction: LossReduction,
    like: Tensor,
    ranks: Ranks,
) -> None:
    """Sum the pending statistics of layers over the ranks that share them, in one flat all-reduce.

    With a mean loss on each of R ranks the error signal of the global mean is d_r / R, so the sums
    over D are divided by R^2 and the state does not depend on the number of ranks. A rank whose
    batch was empty, or whose layer was not used, contributes zeros.

    Args:
        pending: One entry for each tapped layer, in the same order on every rank; changed in place.
        sizes: (m, n) of each, with n = 0 where H is not observed.
        reduction: How the loss reduces over rows.
        like: Gives the device of the exchanged buffer.
        ranks: The ranks that train the model together.
    """
    if ranks.size == 1:
        return
    # float64: row counts stay exact, and summing in another order cannot make replicas differ.
    parts = []
    for sums, (units, features) in zip(pending, sizes, strict=True):
        zero = torch.zeros(units, dtype=torch.float64, device=like.device)
        parts.append(zero if sums.units is None else sums.units.double())
        zero = torch.zeros(features, dtype=torch.float64, device=like.device)
        parts.append(zero if sums.features is None else sums.features.double())
        counts = [sums.rows, sums.feature_rows]
        parts.append(torch.tensor(counts, dtype=torch.float64, device=like.device))
    flat = torch.cat(parts)
    ranks.sum_(flat)
    pieces = iter(flat.split([part.numel() for part in parts]))
    for sums, (_, features) in zip(pending, sizes, strict=True):
        units_sum, features_sum, counts_sum = next(pieces), next(pieces), next(pieces)
        sums.rows, sums.feature_rows = (int(count) for count in counts_sum.tolist())
        if sums.rows:
            divisor = float(ranks.size**2) if reduction == "mean" else 1.0
            sums.units = units_sum / divisor
        if features and sums.feature_rows:
            sums.features = features_sum.clone()


# ------------------------------------------------------------- from sums to moments and factors


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
        v, s = _moved_vectors(
            structure, last, squares, weights, steps, backend, (structure.s_min, structure.s_max)
        )
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
    bounds = structure.c_min, structure.c_max
    u, c = _moved_vectors(structure, last, squares, weights, steps, backend, bounds)
    for index, count in enumerate(rows):
        if not count:
            state = {"v": last[index], "u": last[index]}
            u[index] = last[index]
            scale = structure.factors(state, steps[index])[1]
            assert scale is not None
            c[index] = scale
    return u, c


def _moved_vectors(
    structure: UnitFeatureDiagonal,
    moments: Sequence[Tensor],
    squares: Sequence[Tensor],
    weights: Sequence[float],
    steps: Sequence[int],
    backend: str,
    bounds: tuple[float, float],
) -> tuple[list[Tensor], list[Tensor]]:
    kappa = structure.kappa if structure.clip == "relative" else None
    corrections = [structure.divisor(step) for step in steps]
    settings = structure.beta, structure.eps, structure.v_min
    move = move_moments.on(backend)
    return move(moments, squares, weights, corrections, *settings, *bounds, kappa)


class Basis(NamedTuple):
    """What factors were made of: settings and second moments, with how often each was written."""

    structure: UnitFeatureDiagonal
    step: int
    v: Tensor
    v_version: int
    u: Tensor | None
    u_version: int

    @classmethod
    def of(cls, structure: UnitFeatureDiagonal, state: Mapping[str, Any]) -> Basis:
        """Return the basis that a layer's present state is."""
        v, u = state["v"], state.get("u")
        return cls(structure, state["step"], v, v._version, u, 0 if u is None else u._version)

    def holds(self, structure: UnitFeatureDiagonal, state: Mapping[str, Any]) -> bool:
        """Return whether this is still so: nothing was written or replaced."""
        v, u = state["v"], state.get("u")
        return (
            self.structure is structure
            and self.step == state["step"]
            and self.v is v
            and self.v_version == v._version
            and self.u is u
            and (u is None or self.u_version == u._version)
        )
