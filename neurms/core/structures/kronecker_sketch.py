"""Shampoo's two factors, each held as a frequent-directions sketch: the structure of Sketchy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neurms.compiled.roots import frequent_directions, relative_floor
from neurms.core.ground.errors import check_fraction, check_positive_int, check_real
from neurms.core.structures.base import Context, State, Structure
from neurms.core.structures.kronecker import is_due

__all__ = ["KroneckerSketch"]


@dataclass(frozen=True)
class KroneckerSketch(Structure):
    """F ~ R^(1/2) (x) L^(1/2) as in Shampoo, with L ~ U diag(s) U^T + rho I, R alike.

    ``rho`` sums what deflation took off, so that the exact factor lies between the sketch without
    and with it. The update is L^(-1/4) G R^(-1/4), eps added to the eigenvalues, in O(mnk)
    operations.

    Args:
        rank: k of either side; reduced to m or n where that is less. With k = m and k = n the
            structure is Shampoo's.
        beta: Decay of the factors; 1 sums them.
        eps: Added to the eigenvalues of both factors.
        interval: Only every interval-th gradient enters the sketches.

    Reference:
        "Sketchy: Memory-efficient Adaptive Regularization with Frequent Directions", Feinberg et
        al., 2023, Algorithms 1 and 3. Departures: deflation by the (k+1)-th eigenvalue, as in the
        authors' code; with ``beta`` < 1 the averages are corrected for their start at zero, as in
        :class:`~neurms.core.structures.kronecker.Kronecker`.
    """

    rank: int = 128
    beta: float = 0.999
    eps: float = 1e-6
    interval: int = 1

    def __post_init__(self) -> None:
        check_positive_int("rank", self.rank)
        check_fraction("beta", self.beta, closed=True)
        check_real("eps", self.eps, strict=True)
        check_positive_int("interval", self.interval)

    def init(self, matrix: Tensor) -> State:
        """Return for each side of length d a basis (..., d, k), values (..., k), rho (...)."""
        *batch, m, n = matrix.shape
        state: State = {}
        for side, d in (("left", m), ("right", n)):
            k = min(self.rank, d)
            state[f"{side}_basis"] = matrix.new_zeros((*batch, d, k))
            state[f"{side}_values"] = matrix.new_zeros((*batch, k))
            state[f"{side}_rho"] = matrix.new_zeros(batch)
        return state

    def observe(self, gradient: Tensor, state: State, context: Context) -> None:
        """Add G G^T to the left sketch and G^T G to the right one, when due."""
        if not is_due(context.step, self.interval):
            return
        share = 1.0 if self.beta == 1.0 else 1.0 - self.beta
        columns = gradient * share**0.5
        for side, added in (("left", columns), ("right", columns.mT)):
            basis, values, rho = (state[f"{side}_{part}"] for part in ("basis", "values", "rho"))
            new_basis, new_values, cutoff = frequent_directions(basis, values * self.beta, added)
            basis.copy_(new_basis)
            values.copy_(new_values)
            rho.mul_(self.beta).add_(cutoff)

    def precondition(self, gradient: Tensor, state: State, context: Context) -> Tensor:
        """Return L^(-1/4) G R^(-1/4), shape (..., m, n)."""
        observed = (context.step - 1) // self.interval + 1
        correction = 1.0 if self.beta == 1.0 else 1.0 - self.beta**observed
        half = self._rooted(gradient, state, "left", correction)
        return self._rooted(half.mT, state, "right", correction).mT

    def _rooted(self, columns: Tensor, state: State, side: str, correction: float) -> Tensor:
        """Return (U diag(s) U^T + (rho + eps) I)^(-1/4) X for X (..., d, c)."""
        basis = state[f"{side}_basis"]
        values = state[f"{side}_values"] / correction
        ridge = state[f"{side}_rho"][..., None] / correction + self.eps
        floor = relative_floor(values)
        coordinates = basis.mT @ columns
        scaled = torch.maximum(values + ridge, floor).pow(-0.25)[..., None] * coordinates
        inside = basis @ scaled
        if basis.shape[-1] == basis.shape[-2]:
            return inside
        outside = columns - basis @ coordinates
        return inside + torch.maximum(ridge, floor).pow(-0.25)[..., None] * outside
