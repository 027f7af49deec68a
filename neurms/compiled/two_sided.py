"""The rank-one fit of a gradient's squares, and updates scaled from both sides."""

from __future__ import annotations

import torch
from torch import Tensor

from neurms.compiled.backends import kernel
from neurms.compiled.native import library, pointer, suits, threads

__all__ = ["scaled_square_sum", "two_sided_fit", "two_sided_update_"]

TOLERANCE = 1e-6
"""Relative change of q below which the native power iteration stops before its last round."""


def _matvec(matrix: Tensor, vector: Tensor) -> Tensor:
    product: Tensor = torch.matmul(matrix, vector.unsqueeze(-1)).squeeze(-1)
    return product


@kernel
def two_sided_fit(gradient: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Fit q s^T to G.^2 by power iteration from q = 1.

    s = (G.^2)^T q / ||q||^2 and q = (G.^2) s / ||s||^2 in turn: up to scale the right and left
    principal singular vectors of G.^2, which are positive by Perron-Frobenius.

    Args:
        gradient: G, shape (..., m, n), float32 or float64.
        iterations: Number of rounds, at least 1.

    Returns:
        q, shape (..., m), and s, shape (..., n); zero where a row or a column of G is.

    Reference:
        Structured-Fisher paper, Algorithm 1 (RACS), five rounds. The native form takes q and the
        next s from one pass over G, and stops early once q has settled to 1e-6.

    Example:
        >>> import torch
        >>> q, s = two_sided_fit(torch.tensor([[1.0, 2.0], [2.0, 4.0]]), 2)
        >>> torch.outer(q, s)
        tensor([[ 1.,  4.],
                [ 4., 16.]])
    """
    squares = gradient.square()
    tiny = torch.finfo(squares.dtype).tiny
    s = squares.mean(-2)
    q = squares.new_zeros(squares.shape[:-1])
    for rounds in range(iterations):
        if rounds > 0:
            s = _matvec(squares.mT, q) / q.square().sum(-1, keepdim=True).clamp(min=tiny)
        # ||s||^2 underflows long before s does, so s enters normalised by its largest entry.
        peak = s.amax(-1, keepdim=True).clamp(min=tiny)
        unit = s / peak
        q = _matvec(squares, unit) / (unit.square().sum(-1, keepdim=True) * peak).clamp(min=tiny)
    return q, s


@two_sided_fit.native(
    lambda gradient, iterations: gradient.ndim == 2 and (suits(gradient) or suits(gradient.mT))
)
def _two_sided_fit(gradient: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    kernels = library()
    assert kernels is not None
    m, n = gradient.shape
    q, s = gradient.new_empty(m), gradient.new_empty(n)
    rows = gradient.is_contiguous()
    fit = kernels.neurms_two_sided_fit if rows else kernels.neurms_two_sided_fit_transposed
    sizes = (m, n) if rows else (n, m)
    fit(pointer(gradient), *sizes, iterations, TOLERANCE, pointer(q), pointer(s), threads())
    return q, s


@kernel
def scaled_square_sum(gradient: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return ``sum_ij (left_i G_ij right_j)^2`` as a 0-d tensor.

    Args:
        gradient: G, shape (m, n).
        left: Shape (m,).
        right: Shape (n,).

    Example:
        >>> import torch
        >>> scaled_square_sum(torch.ones(2, 2), torch.tensor([1.0, 2.0]), torch.ones(2))
        tensor(10.)
    """
    return _matvec(gradient.square(), right.square()).mul(left.square()).sum()


@scaled_square_sum.native(
    lambda gradient, left, right: suits(gradient, left, right) or suits(gradient.mT, left, right)
)
def _scaled_square_sum(gradient: Tensor, left: Tensor, right: Tensor) -> Tensor:
    kernels = library()
    assert kernels is not None
    if not gradient.is_contiguous():
        gradient, left, right = gradient.mT, right, left
    total = kernels.neurms_scaled_square_sum(
        pointer(gradient), *gradient.shape, pointer(left), pointer(right), threads()
    )
    return gradient.new_tensor(total)


@kernel
def two_sided_update_(
    w: Tensor, gradient: Tensor, left: Tensor, right: Tensor, step: Tensor, decay: Tensor
) -> Tensor:
    """Move a weight along a gradient scaled from both sides, in place.

    ``W_ij <- decay W_ij - step left_i G_ij right_j``.

    Args:
        w: The weight, shape (m, n); overwritten.
        gradient: G, the same shape; left as it is.
        left: Shape (m,).
        right: Shape (n,).
        step: 0-d tensor.
        decay: 0-d tensor.

    Returns:
        ``w``.

    Example:
        >>> import torch
        >>> one = torch.tensor(1.0)
        >>> two_sided_update_(
        ...     torch.ones(1, 2), torch.ones(1, 2), torch.ones(1), torch.ones(2), one, one
        ... )
        tensor([[0., 0.]])
    """
    scaled = gradient * (left * step.to(left.device, left.dtype)).unsqueeze(-1) * right
    return w.mul_(decay.to(w.device, w.dtype)).sub_(scaled)


@two_sided_update_.native(
    lambda w, gradient, left, right, step, decay: (
        suits(w, gradient, left, right) or suits(w.mT, gradient.mT, left, right)
    )
)
def _two_sided_update_(
    w: Tensor, gradient: Tensor, left: Tensor, right: Tensor, step: Tensor, decay: Tensor
) -> Tensor:
    kernels = library()
    assert kernels is not None
    by_rows = w.is_contiguous()
    first, second = (left, right) if by_rows else (right, left)
    kernels.neurms_scaled_update(
        pointer(w),
        pointer(gradient),
        *(w if by_rows else w.mT).shape,
        pointer(first),
        pointer(second),
        float(step),
        float(decay),
        threads(),
    )
    return w
