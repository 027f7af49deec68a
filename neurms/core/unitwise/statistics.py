"""Pending second moments of units and features: summed over backward passes, committed once.

Between two optimizer steps a layer may be back-propagated many times (micro-batches, a module used
twice) and on several ranks. Sums of squares and row counts add up exactly, so that k micro-batches
equal one big batch and the number of ranks does not matter; only the commit turns them into the
means that the moving averages take.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neurms.core.ground.ranks import Ranks
from neurms.core.structures.base import Moments
from neurms.core.taps.protocol import Sums
from neurms.core.unitwise.rule import LossReduction

__all__ = ["PendingSums", "scalar", "synchronize"]

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
        self.units = _plus(self.units, sums.unit_square_sum)
        self.features = _plus(self.features, sums.feature_square_sum)
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
        sums = [s for s in (self.units, self.features) if s is not None]
        least = min((_GREATEST[s.dtype] for s in sums), default=math.inf)
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


def _plus(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    if part is None:
        return total
    return part if total is None else total + part
