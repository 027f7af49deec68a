"""I (x) Q with diagonal Q over units, estimated from one sample: row normalisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neurms.compiled.normalization import row_normalize
from neurms.core.structures.base import Context, State, Structure, Transform

__all__ = ["FLOOR", "RowNormalized", "RowStandardized", "WithoutRadialPart"]

FLOOR = 1e-12
"""Least norm of a row that is divided by."""


@dataclass(frozen=True)
class RowNormalized(Structure):
    """Every unit's row divided by its norm: U_i = R_i / max(||R_i||, 1e-12).

    The best F ~ I (x) Q with diagonal Q, for F = vec(R) vec(R)^T of the current matrix alone, has
    q_i = ||R_i||^2 / n, and Q^(-1/2) R = sqrt(n) U. It keeps no state.

    Reference:
        RMNP, arXiv 2603.20527, Algorithm 1; the structured-Fisher paper, section 3, normalisation.

    Example:
        >>> import torch
        >>> RowNormalized()(torch.tensor([[3.0, -4.0]]), {}, Context(step=1))
        tensor([[ 0.6000, -0.8000]])
    """

    row_local = True
    any_scale = True

    def observe(self, gradient: Tensor, state: State, context: Context) -> None:
        """Do nothing: one sample is all there is."""

    def precondition(self, gradient: Tensor, state: State, context: Context) -> Tensor:
        """Return the matrix (..., m, n) with rows of norm 1, zero rows kept."""
        return row_normalize(gradient, FLOOR)


@dataclass(frozen=True)
class RowStandardized(Transform):
    """Every unit's row centred and divided by its standard deviation.

    U_ij = (G_ij - mean_j G_ij) / std_j G_ij. Settled: a row whose spread is within rounding of its
    mean (a constant row, where the quotient would be noise of size 1) gets no update.

    A row of one entry is its own mean, so a matrix of one feature never moves.

    Reference:
        Ma et al., "SWAN", arXiv 2412.13148, Algorithm 3 (GradNorm): the deviation is taken about
        the row's mean, divided by n and not by n - 1, and nothing is added to it.
    """

    row_local = True
    least_features = 2

    def __call__(self, update: Tensor, state: State, context: Context) -> Tensor:
        """Return the standardised matrix (..., m, n)."""
        mean = update.mean(-1, keepdim=True)
        centred = update - mean
        spread = torch.linalg.vector_norm(centred, dim=-1, keepdim=True).div_(
            update.shape[-1] ** 0.5
        )
        noise = mean.abs_().mul_(8.0 * torch.finfo(update.dtype).eps)
        return torch.where(spread > noise, centred / spread, 0.0)


@dataclass(frozen=True)
class WithoutRadialPart(Transform):
    """Remove from each unit's row its component along the unit's weights.

    U_i = R_i - (R_i . W_i / ||W_i||^2) W_i, so that a step turns the weights of a unit and leaves
    their norm to first order. A row of zero weights keeps its update. All of a row of one entry is
    along the weight, so a matrix of one feature never moves once its weights are not zero.

    Reference:
        Nora. The component is the Gram-Schmidt projection on the weight's own row.
    """

    needs_weight = True
    row_local = True
    least_features = 2

    def __call__(self, update: Tensor, state: State, context: Context) -> Tensor:
        """Return the projected matrix (..., m, n)."""
        assert context.weight is not None
        radial = row_normalize(context.weight, torch.finfo(update.dtype).tiny)
        along = (update * radial).sum(-1, keepdim=True)
        return torch.addcmul(update, along, radial, value=-1.0)
