"""Diag(v) in coordinates that were chosen elsewhere: what runs inside a subspace."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neurms.compiled.bases import noise_floor
from neurms.core.structures.base import Context, State
from neurms.core.structures.diagonal import Diagonal

__all__ = ["ProjectedDiagonal"]


@dataclass(frozen=True)
class ProjectedDiagonal(Diagonal):
    """F ~ Diag(v) for z = U^T G: the diagonal structure with a guard against rounding noise.

    m <- b1 m + (1 - b1) z ; v <- b2 v + (1 - b2) z.^2 ; update m / (sqrt(v) + eps), by default
    without eps and without bias correction. Being a full-rank structure in the coordinates z, it is
    what the low-rank extension wraps to give Alice (Eigen-Adam restricted to r directions), GaLore,
    Fira and APOLLO. State: 2 rn numbers for z of shape (r, n), rn for b1 = 0.

    Args:
        betas: b1 and b2, both in [0, 1).
        eps: Added to the root.
        bias_correction: Correct both averages for their start at zero.

    Raises:
        ValueError: A setting is out of its range.

    Reference:
        Structured-Fisher paper, Algorithm 4, lines for m, v and omega. Settled here: a coordinate
        whose mean square is rounding noise beside its column's energy (see
        :func:`~neurms.compiled.bases.noise_floor`) gets no update. A gradient of rank below r has
        such coordinates, and without eps the quotient would turn them into full updates.
    """

    eps: float = 0.0
    bias_correction: bool = False

    def precondition(self, gradient: Tensor, state: State, context: Context) -> Tensor:
        """Return z / (sqrt(v) + eps), zero where v is rounding noise, shape (..., r, n)."""
        squares = state["exp_avg_sq"]
        update = super().precondition(gradient, state, context)
        return torch.where(squares > noise_floor(squares), update, 0.0)

    def column_energy(self, state: State, context: Context) -> Tensor:
        """Return the average of colsum(z.^2), corrected for its start at zero, shape (..., n)."""
        return state["exp_avg_sq"].sum(-2) / (1.0 - self.betas[1] ** context.step)

    def rotate_(self, state: State, rotation: Tensor) -> None:
        """Carry the moments over to new coordinates z' = R z, in place.

        m <- R m and v <- (R.^2) v, the second exact where the coordinates are uncorrelated.

        Args:
            state: The state to rotate.
            rotation: R = U'^T U, shape (..., r, r).
        """
        if self.betas[0]:
            state["exp_avg"].copy_(rotation @ state["exp_avg"])
        state["exp_avg_sq"].copy_(rotation.square() @ state["exp_avg_sq"])
