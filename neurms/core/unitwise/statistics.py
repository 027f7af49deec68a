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

__all__ = [
    "GREATEST",
    "Basis",
    "Factors",
    "Moved",
    "Part",
    "PendingSums",
    "basis_of",
    "by_unit",
    "is_basis",
    "moved",
    "pooled",
    "scalar",
    "synchronize",
]

Factors = tuple[Tensor, Tensor | None]
"""s (m,) and c (n,), None for 1."""

GREATEST = {dtype: torch.finfo(dtype).max for dtype in (torch.float32, torch.float64)}


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
        least = math.inf if self.units is None else GREATEST[self.units.dtype]
        if self.features is not None:
            least = min(least, GREATEST[self.features.dtype])
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
    """What a commit of several layers makes of them, one list of each.

    Args:
        v: Second moments of units.
        u: Of features; None where those have none.
        s: Factors of units.
        c: Factors of features, None for 1.
    """

    v: Sequence[Tensor]
    u: Sequence[Tensor | None]
    s: Sequence[Tensor]
    c: Sequence[Tensor | None]


class Part(NamedTuple):
    """One layer's part in a commit; lists of them need not be of this class.

    Args:
        state: The layer's state; read only.
        pending: What it has seen.
        features: n.
        heads: Number of equal runs of units that share one second moment, 0 for none.
    """

    state: Mapping[str, Any]
    pending: PendingSums
    features: int
    heads: int = 0


AnyPart = Part | tuple[Mapping[str, Any], PendingSums, int, int]
"""Making a plain tuple is no call of Python's, of which there would be two for each layer."""


def pooled(units: Tensor, heads: int) -> Tensor:
    """Return one number for each second moment: the mean of the units of each head, if any."""
    return units.reshape(heads, -1).mean(-1) if heads else units


def by_unit(s: Tensor, units: int, heads: int) -> Tensor:
    """Return factors by unit where heads share them."""
    return s.repeat_interleave(units // heads) if heads else s


def moved(
    structure: UnitFeatureDiagonal,
    parts: Sequence[AnyPart],
    reduction: LossReduction,
    backend: str,
) -> Moved:
    """Return what committing all parts now would give; nothing changes.

    Args:
        structure: The settings, the same for all.
        parts: Layers that have seen rows of D.
        reduction: How the loss reduces over rows.
        backend: How kernels run.
    """
    if not parts:
        return Moved([], [], [], [])
    # Lists of plain attributes: where caches are cold, a call for each layer costs more.
    states, pending, _, heads = zip(*parts, strict=True)
    steps = [state["step"] + 1 if state else 1 for state in states]
    sums: list[Any] = [own.units for own in pending]
    squares = [pooled(own, h) if h else own for own, h in zip(sums, heads, strict=True)]
    mean = reduction == "mean"
    weights = [float(own.rows) if mean else 1.0 / own.rows for own in pending]
    last = [
        state["v"] if "v" in state else torch.zeros_like(own)
        for state, own in zip(states, squares, strict=True)
    ]
    with span("scale"):
        bounds = structure.s_min, structure.s_max
        v, s = _moved_vectors(structure, last, squares, weights, steps, backend, bounds)
        u, c = _moved_features(structure, parts, steps, backend)
    left = [
        by_unit(one, own.numel(), h) if h else one
        for one, own, h in zip(s, sums, heads, strict=True)
    ]
    return Moved(v, u, left, c)


def _moved_features(
    structure: UnitFeatureDiagonal, parts: Sequence[AnyPart], steps: Sequence[int], backend: str
) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
    nothing: list[Tensor | None] = [None] * len(parts)
    if not structure.factored:
        return nothing, nothing
    # A layer that saw no rows of H, in an empty batch, weighs none: its u stays.
    rows = [own.feature_rows for _, own, _, _ in parts]
    squares: list[Any] = [
        _zeros(own, size) if own.features is None else own.features for _, own, size, _ in parts
    ]
    last: list[Any] = [
        state["u"] if "u" in state else torch.zeros_like(own)
        for (state, _, _, _), own in zip(parts, squares, strict=True)
    ]
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


def _zeros(pending: PendingSums, size: int) -> Tensor:
    assert pending.units is not None
    return pending.units.new_zeros(size)


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
    divisors = {step: structure.divisor(step) for step in set(steps)}
    corrections = [divisors[step] for step in steps]
    settings = structure.beta, structure.eps, structure.v_min
    move = move_moments.on(backend)
    return move(moments, squares, weights, corrections, *settings, *bounds, kappa)


Basis = tuple[UnitFeatureDiagonal, int, Tensor, int, Tensor | None, int]
"""What factors were made of: settings, step, v and u, each with how often it was written."""


def basis_of(structure: UnitFeatureDiagonal, state: Mapping[str, Any]) -> Basis:
    """Return the basis that a layer's present state is."""
    v, u = state["v"], state["u"] if "u" in state else None
    return structure, state["step"], v, v._version, u, 0 if u is None else u._version


def is_basis(basis: Basis, structure: UnitFeatureDiagonal, state: Mapping[str, Any]) -> bool:
    """Return whether a basis is the present state's: nothing was written or replaced."""
    made, step, v, v_version, u, u_version = basis
    return (
        made is structure
        and step == state["step"]
        and v is state["v"]
        and v_version == v._version
        and u is (state["u"] if "u" in state else None)
        and (u is None or u_version == u._version)
    )
