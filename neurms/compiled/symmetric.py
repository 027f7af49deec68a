"""Products that are known to be symmetric: a half is computed, in panels of rows, and mirrored.

BLAS has them as syrk, which torch does not call. A product of m x m blocks with p panels costs
(p + 1) / 2p of the whole one.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["add_gram_", "panels"]

LEAST = 256
"""Sides below which cutting costs what it saves."""
ROWS = 128
"""Least rows of a panel: products of fewer are slower by more than they save."""
MOST = 8


def panels(side: int) -> list[tuple[int, int]]:
    """Return beginning and end of the panels of rows of a symmetric product of that side.

    Example:
        >>> panels(200), panels(512)
        ([(0, 200)], [(0, 128), (128, 256), (256, 384), (384, 512)])
    """
    count = 1 if side < LEAST else min(MOST, side // ROWS)
    edges = [side * i // count for i in range(count + 1)]
    return list(zip(edges[:-1], edges[1:], strict=True))


def add_gram_(total: Tensor, matrix: Tensor, keep: float, share: float) -> Tensor:
    """Average Gram matrices in place: ``total <- keep total + share X X^T``.

    No temporary of the total's size is made.

    Args:
        total: Symmetric, shape (..., m, m); overwritten.
        matrix: X, shape (..., m, n).
        keep: Factor of what is there.
        share: Factor of what is added.

    Returns:
        ``total``.

    Example:
        >>> import torch
        >>> add_gram_(torch.eye(2), torch.tensor([[1.0], [2.0]]), 0.5, 0.5)
        tensor([[1.0000, 1.0000],
                [1.0000, 2.5000]])
    """
    whole = total.ndim != 2 or not total.is_cpu or total.shape[-1] < LEAST
    if whole or total.stride(-1) != 1:
        return total.mul_(keep).add_(matrix @ matrix.mT, alpha=share)
    for begin, end in panels(total.shape[-1]):
        rows = matrix[begin:end]
        total[begin:end, :end].addmm_(rows, matrix[:end].mT, beta=keep, alpha=share)
        if begin:
            total[:begin, begin:end] = total[begin:end, :begin].mT
    return total
