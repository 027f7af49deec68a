"""Norms of matrices, of which ranks may hold parts."""

from __future__ import annotations

import torch
from torch import Tensor

from neurms.core.structures.base import Context

__all__ = ["frobenius"]


def frobenius(matrix: Tensor, context: Context | None = None) -> Tensor:
    """Return the Frobenius norm (...) of each matrix (..., m, n), over all ranks that share it."""
    norm: Tensor = torch.linalg.vector_norm(matrix, dim=(-2, -1))
    if context is None or context.shard is None:
        return norm
    return context.summed(norm.square_()).sqrt_()
