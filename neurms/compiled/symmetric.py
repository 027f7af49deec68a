"""Products that are known to be symmetric: a half is computed, in panels of rows, and mirrored.

BLAS has them as syrk, which torch does not call. A product of m x m blocks with p panels costs
(p + 1) / 2p of the whole one.
"""

from __future__ import annotations

from torch import Tensor

from neurms.compiled.products import addmm_, product

__all__ = ["add_gram_", "half_product_", "panel_count"]


def panel_count(side: int) -> int:
    """Return into how many panels of rows a symmetric product of that side is cut.

    Example:
        >>> panel_count(200), panel_count(512), panel_count(4096)
        (1, 4, 8)
    """
    # Cutting smaller ones, or into smaller panels, costs what it saves: five rounds of
    # Newton-Schulz on 256 x 256 take 1.01 of the time of whole products, on 384 x 384 .85, on 512
    # x 512 .78 (one thread, AMD EPYC).
    return 1 if side < 384 else min(8, side // 128)


def half_product_(total: Tensor, x: Tensor, y: Tensor, keep: float, share: float) -> Tensor:
    """Bring ``total`` to ``keep total + share x @ y``, all of them known to be symmetric.

    A kernel of TorchScript may call it.

    Args:
        total: Shape (m, m), overwritten; with ``keep`` = 0 whatever it holds.
        x: Shape (m, n).
        y: Shape (n, m).
        keep: Factor of what is there.
        share: Factor of the product.

    Returns:
        ``total``.
    """
    side, count = x.size(-2), panel_count(x.size(-2))
    for i in range(count):
        begin, end = side * i // count, side * (i + 1) // count
        addmm_(total[begin:end, :end], x[begin:end], y[:, :end], keep, share)
        total[:begin, begin:end] = total[begin:end, :begin].mT
    return total


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
    cut = total.ndim == 2 and total.is_cpu and total.stride(-1) == 1
    if cut and panel_count(total.shape[-1]) > 1:
        return half_product_(total, matrix, matrix.mT, keep, share)
    return total.mul_(keep).add_(product(matrix, matrix.mT), alpha=share)
