"""Rank-one fits of a gradient's squares that read it once, and what they scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neurms.compiled.backends import Kernel, kernel
from neurms.compiled.lists import list_kernel
from neurms.compiled.native import addresses, are_plain, library, numbers, threads
from neurms.compiled.square_sums import are_stored, averages_and_scales

__all__ = ["fit_once", "tracked_start", "two_sided_once"]


def _matvec(matrix: Tensor, vector: Tensor) -> Tensor:
    product: Tensor = torch.matmul(matrix, vector.unsqueeze(-1)).squeeze(-1)
    return product


def tracked_start(s: Tensor) -> Tensor:
    """Return what a tracked fit starts from: s (..., n) in units of its mean, at least 1e-3.

    The bound looks at features that have rested; as long as nothing is known, all are alike.
    """
    mean = s.mean(-1, keepdim=True)
    known = torch.where(mean == 0, torch.ones_like(mean), mean)
    return torch.where(mean == 0, torch.ones_like(s), (s / known).clamp(min=1e-3))


def fit_once(gradient: Tensor, s: Tensor, tracked: bool) -> tuple[Tensor, Tensor]:
    """Return the fit q' (..., m) and s' (..., n) of :func:`two_sided_once` for G (..., m, n)."""
    squares = gradient.square()
    if not tracked:
        return squares.mean(-1), squares.mean(-2)
    unit = tracked_start(s)
    q = _matvec(squares, unit) / unit.square().sum(-1, keepdim=True)
    # ||q||^2 underflows long before q does, so q enters normalised by its largest entry.
    tiny = 2.2250738585072014e-308 if squares.dtype == torch.float64 else 1.1754943508222875e-38
    peak = q.amax(-1, keepdim=True).clamp(min=tiny)
    share = q / peak
    norm = (share.square().sum(-1, keepdim=True) * peak).clamp(min=tiny)
    return q, _matvec(squares.mT, share) / norm


def _fitted(
    gradient: Tensor, q: Tensor, s: Tensor, correction: Tensor, beta: float, tracked: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    fit_q, fit_s = fit_once(gradient, s, tracked)
    new_q, new_s = torch.lerp(q, fit_q, 1.0 - beta), torch.lerp(s, fit_s, 1.0 - beta)
    left = torch.where(new_q > 0, new_q.rsqrt(), torch.zeros_like(q)) * correction
    if not tracked:
        left = left * new_s.mean(-1, keepdim=True).sqrt()
    right = torch.where(new_s > 0, new_s.rsqrt(), torch.zeros_like(s))
    # Multiplied before they are squared: right^2 overflows where gradients are small.
    scaled = gradient * left.unsqueeze(-1) * right.unsqueeze(-2)
    return new_q, new_s, left, right, scaled.square().sum(-1).sum(-1).sqrt()


# The correction changes from step to step: compiled forms get it as a 0-d tensor.
_fit: Kernel[..., Any] = kernel(_fitted)


@list_kernel
def two_sided_once(
    gradients: Sequence[Tensor],
    q: Sequence[Tensor],
    s: Sequence[Tensor],
    corrections: Sequence[float],
    beta: float,
    tracked: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Say where averages of a rank-one fit of G.^2 move, and how they scale G there.

    ``q' = beta q + (1 - beta) q^``, s' likewise, where q^ and s^ are the means of G.^2 over columns
    and over rows, or with ``tracked`` one round of power iteration that starts from the average s:
    ``q^ = (G.^2) u / ||u||^2`` and ``s^ = (G.^2)^T q^ / ||q^||^2`` with u = s over its mean. Then
    ``left = correction sqrt(T / q')`` with T the mean of s' (1 for ``tracked``) and
    ``right = 1 / sqrt(s')``, each zero where the average is. Nothing is written.

    Args:
        gradients: G, shapes (..., m, n), float32 or float64.
        q: Averages over units, shapes (..., m).
        s: Averages over features, shapes (..., n).
        corrections: Factors of ``left``.
        beta: Decay, in [0, 1).
        tracked: Which fit.

    Returns:
        q' (..., m), s' (..., n), left (..., m), right (..., n) and ``||left_i G_ij right_j||``,
        shape (...), of every matrix. A NaN or an infinity in G shows in the norm.

    Reference:
        RACS without its five rounds. The native form has all of it from one read of G, because q^_i
        is known while row i is in cache; a ``tracked`` one stored by columns is read twice.

    Example:
        >>> import torch
        >>> g, q, s = torch.tensor([[1.0, 2.0], [2.0, 4.0]]), torch.zeros(2), torch.zeros(2)
        >>> *_, (norm,) = two_sided_once([g], [q], [s], [1.0], 0.0, False)
        >>> norm
        tensor(2.)
    """
    each = zip(gradients, q, s, corrections, strict=True)
    made = [_fit(*item, beta, tracked) for item in each]
    new_q, new_s, left, right, norms = ([item[k] for item in made] for k in range(5))
    return new_q, new_s, left, right, norms


def _are_plain(
    gradients: Sequence[Tensor],
    q: Sequence[Tensor],
    s: Sequence[Tensor],
    corrections: Sequence[float],
) -> list[bool]:
    stored = are_stored(gradients)
    return [good and are_plain([a, b]) for good, a, b in zip(stored, q, s, strict=True)]


@two_sided_once.native(_are_plain)
def _two_sided_once(
    gradients: Sequence[Tensor],
    q: Sequence[Tensor],
    s: Sequence[Tensor],
    corrections: Sequence[float],
    beta: float,
    tracked: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    kernels = library()
    assert kernels is not None
    parts, count = averages_and_scales(q, s), len(q)
    new_q, new_s, left, right = parts
    norms = q[0].new_empty(count, dtype=torch.float64)
    kernels.neurms_two_sided_once(
        count,
        addresses(gradients),
        numbers("q", map(Tensor.numel, q)),
        numbers("q", map(Tensor.numel, s)),
        numbers("q", [not gradient.is_contiguous() for gradient in gradients]),
        numbers("f", corrections),
        beta,
        tracked,
        *map(addresses, (q, s, *parts)),
        norms.data_ptr(),
        threads(),
    )
    return new_q, new_s, left, right, list(norms.float().unbind())
