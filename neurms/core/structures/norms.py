"""Norms of matrices, of which ranks may hold parts."""

from __future__ import annotations

import torch
from torch import Tensor

from neurms.core.ground.sums import Summing
from neurms.core.structures.base import Context

__all__ = ["frobenius", "norms_over_rows"]


def frobenius(matrix: Tensor) -> Tensor:
    """Return the Frobenius norm (...) of each matrix (..., m, n)."""
    norm: Tensor = torch.linalg.vector_norm(matrix, dim=(-2, -1))
    return norm


def norms_over_rows(context: Context, *matrices: Tensor) -> Summing[tuple[Tensor, ...]]:
    """Return the norms (...) of matrices (..., m, n), over all ranks that share them."""
    norms = [frobenius(matrix) for matrix in matrices]
    if context.shard is None:
        return tuple(norms)
    return ((yield torch.stack(norms).square_()).sqrt_()).unbind()
