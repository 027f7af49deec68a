"""The rank-one fit of a gradient's squares, and what it scales from both sides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neurms.compiled.backends import Kernel, kernel
from neurms.compiled.lists import list_kernel
from neurms.compiled.native import addresses, are_plain, library, numbers, suits, threads
from neurms.compiled.square_sums import are_stored, averages_and_scales

__all__ = ["scaled_square_sum", "two_sided_fit", "two_sided_scales"]

TOLERANCE = 5e-7
"""Relative error, of each entry of q and s, at which the native power iteration stops early.

A round's largest relative change bounds that of every later round, because a positive matrix
brings positive vectors nearer in Hilbert's projective metric (Birkhoff); the ratio of two changes
estimates how much of the last one is left.
"""


def _matvec(matrix: Tensor, vector: Tensor) -> Tensor:
    product: Tensor = torch.matmul(matrix, vector.unsqueeze(-1)).squeeze(-1)
    return product


def _power_iteration(gradient: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    squares = gradient.square()
    # The least normal number, spelled out: TorchScript knows no torch.finfo.
    tiny = 2.2250738585072014e-308 if squares.dtype == torch.float64 else 1.1754943508222875e-38
    s = squares.mean(-2)
    q = squares.new_zeros(squares.shape[:-1])
    if squares.shape[-2] == 1 or squares.shape[-1] == 1:
        # Of rank one, so that the first round's fit is exact. (TorchInductor would also write a
        # single element's rounds into each other, to an expression that it takes minutes over.)
        iterations = 1
    for rounds in range(iterations):
        if rounds > 0:
            s = _matvec(squares.mT, q) / q.square().sum(-1, keepdim=True).clamp(min=tiny)
        # ||s||^2 underflows long before s does, so s enters normalised by its largest entry.
        peak = s.amax(-1, keepdim=True).clamp(min=tiny)
        unit = s / peak
        q = _matvec(squares, unit) / (unit.square().sum(-1, keepdim=True) * peak).clamp(min=tiny)
    return q, s


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
        next s from one pass over G, and stops early at TOLERANCE.

    Example:
        >>> import torch
        >>> q, s = two_sided_fit(torch.tensor([[1.0, 2.0], [2.0, 4.0]]), 2)
        >>> torch.outer(q, s)
        tensor([[ 1.,  4.],
                [ 4., 16.]])
    """
    return _power_iteration(gradient, iterations)


def _is_stored(gradient: Tensor) -> bool:
    return gradient.ndim == 2 and (suits(gradient) or suits(gradient.mT))


@two_sided_fit.native(lambda gradient, iterations: _is_stored(gradient))
def _two_sided_fit(gradient: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    kernels = library()
    assert kernels is not None
    m, n = gradient.shape
    q, s = gradient.new_empty(m), gradient.new_empty(n)
    rows = gradient.is_contiguous()
    fit = kernels.neurms_two_sided_fit if rows else kernels.neurms_two_sided_fit_transposed
    sizes = (m, n) if rows else (n, m)
    fit(gradient.data_ptr(), *sizes, iterations, TOLERANCE, q.data_ptr(), s.data_ptr(), threads())
    return q, s


def _scaled(
    gradient: Tensor, q: Tensor, s: Tensor, correction: Tensor, iterations: int, fresh: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    fit_q, fit_s = _power_iteration(gradient, iterations)
    new_q, new_s = torch.lerp(q, fit_q, fresh), torch.lerp(s, fit_s, fresh)
    left = torch.where(new_q > 0, new_q.rsqrt(), torch.zeros_like(q)) * correction
    right = torch.where(new_s > 0, new_s.rsqrt(), torch.zeros_like(s))
    square = _matvec(gradient.square(), right.square()).mul(left.square()).sum()
    return new_q, new_s, left, right, square.sqrt()


# The correction changes from step to step: compiled forms get it as a 0-d tensor.
_scale: Kernel[..., Any] = kernel(_scaled)


@list_kernel
def two_sided_scales(
    gradients: Sequence[Tensor],
    q: Sequence[Tensor],
    s: Sequence[Tensor],
    corrections: Sequence[float],
    iterations: int,
    fresh: float,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Say where averages of the fit of :func:`two_sided_fit` move, and how they scale G there.

    ``q' = q + fresh (q^ - q)`` for the gradient's own q^, s' likewise; ``left = correction /
    sqrt(q')``, ``right = 1 / sqrt(s')``, each zero where the average is. Nothing is written.

    Args:
        gradients: G, shapes (m, n), float32 or float64.
        q: Averages over units, shapes (m,).
        s: Averages over features, shapes (n,).
        corrections: Factors of ``left``.
        iterations: Rounds of the fit.
        fresh: Weight of this gradient's fit.

    Returns:
        q' (m,), s' (n,), left (m,), right (n,), and ``||left_i G_ij right_j||`` as a 0-d tensor, of
        every matrix. A NaN or an infinity in G shows in the norm.

    Reference:
        Structured-Fisher paper, Algorithm 1 (RACS). The native form spends no pass over G on the
        norm: with ``right`` known, the fit's last pass has its sums.

    Example:
        >>> import torch
        >>> g, q, s = torch.tensor([[1.0, 2.0], [2.0, 4.0]]), torch.zeros(2), torch.zeros(2)
        >>> *_, (norm,) = two_sided_scales([g], [q], [s], [1.0], 2, 1.0)
        >>> norm
        tensor(2.)
    """
    each = zip(gradients, q, s, corrections, strict=True)
    made = [_scale(*item, iterations, fresh) for item in each]
    new_q, new_s, left, right, norms = ([item[k] for item in made] for k in range(5))
    return new_q, new_s, left, right, norms


def _are_plain(
    gradients: Sequence[Tensor],
    q: Sequence[Tensor],
    s: Sequence[Tensor],
    corrections: Sequence[float],
) -> list[bool]:
    if are_plain([*gradients, *q, *s]):
        return [g.dim() == 2 and g.numel() > 0 for g in gradients]
    stored = are_stored(gradients)
    each = zip(stored, gradients, q, s, strict=True)
    return [good and g.numel() > 0 and are_plain([a, b]) for good, g, a, b in each]


@two_sided_scales.native(_are_plain)
def _two_sided_scales(
    gradients: Sequence[Tensor],
    q: Sequence[Tensor],
    s: Sequence[Tensor],
    corrections: Sequence[float],
    iterations: int,
    fresh: float,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    kernels = library()
    assert kernels is not None
    parts, count = averages_and_scales(q, s), len(q)
    new_q, new_s, left, right = parts
    norms = q[0].new_empty(count, dtype=torch.float64)
    kernels.neurms_two_sided_scales(
        count,
        addresses(gradients),
        numbers("q", map(Tensor.numel, q)),
        numbers("q", map(Tensor.numel, s)),
        numbers("q", [not gradient.is_contiguous() for gradient in gradients]),
        iterations,
        TOLERANCE,
        fresh,
        numbers("f", corrections),
        *map(addresses, (q, s, *parts)),
        norms.data_ptr(),
        threads(),
    )
    return new_q, new_s, left, right, list(norms.float().unbind())


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
    # Not as a product of matrix and vector, whose running sum over 40,000 features is 2e-6 off.
    weighted = gradient.square().mul(right.square())
    return weighted.sum(-1).mul(left.square()).sum()


@scaled_square_sum.native(
    lambda gradient, left, right: suits(gradient, left, right) or suits(gradient.mT, left, right)
)
def _scaled_square_sum(gradient: Tensor, left: Tensor, right: Tensor) -> Tensor:
    kernels = library()
    assert kernels is not None
    if not gradient.is_contiguous():
        gradient, left, right = gradient.mT, right, left
    total = kernels.neurms_scaled_square_sum(
        gradient.data_ptr(), *gradient.shape, left.data_ptr(), right.data_ptr(), threads()
    )
    return gradient.new_tensor(total)
