"""Rank-one fits of a gradient's squares that read it once, and what they scale."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from neurms.compiled.backends import kernel
from neurms.compiled.native import LEAST_ELEMENTS, fits, is_plain, library, threads
from neurms.compiled.square_sums import addresses, numbers, vectors

__all__ = ["fit_once", "tracked_start", "two_sided_once_"]


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
    """Return the fit q' (..., m) and s' (..., n) of :func:`two_sided_once_` for G (..., m, n)."""
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


@kernel
def two_sided_once_(
    gradients: list[Tensor],
    q: list[Tensor],
    s: list[Tensor],
    corrections: list[float],
    fresh: float,
    tracked: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Average a rank-one fit of every G.^2, and say how it scales G.

    ``q <- q + fresh (q' - q)``, s likewise, where q' and s' are the means of G.^2 over columns and
    over rows, or with ``tracked`` one round of power iteration that starts from the average s:
    ``q' = (G.^2) u / ||u||^2`` and ``s' = (G.^2)^T q' / ||q'||^2`` with u = s over its mean. Then
    ``left = correction sqrt(T / q)`` with T the mean of s (1 for ``tracked``) and
    ``right = 1 / sqrt(s)``, each zero where the average is.

    Args:
        gradients: G, shapes (..., m, n), float32 or float64.
        q: Averages over units, shapes (..., m); overwritten.
        s: Averages over features, shapes (..., n); overwritten.
        corrections: Factors of ``left``.
        fresh: Weight of these gradients' fits.
        tracked: Which fit.

    Returns:
        left (..., m), right (..., n) and ``||left_i G_ij right_j||`` (...) of every matrix.

    Reference:
        RACS without its five rounds. The native form has all of it from one read of G, because q'_i
        is known while row i is in cache; a ``tracked`` one stored by columns is read twice.

    Example:
        >>> import torch
        >>> g, q, s = torch.tensor([[1.0, 2.0], [2.0, 4.0]]), torch.zeros(2), torch.zeros(2)
        >>> *_, (norm,) = two_sided_once_([g], [q], [s], [1.0], 1.0, False)
        >>> norm
        tensor(2.)
    """
    lefts: list[Tensor] = []
    rights: list[Tensor] = []
    norms: list[Tensor] = []
    for i in range(len(gradients)):
        new_q, new_s = fit_once(gradients[i], s[i], tracked)
        q[i].lerp_(new_q, fresh)
        s[i].lerp_(new_s, fresh)
        left = torch.where(q[i] > 0, q[i].rsqrt(), torch.zeros_like(q[i])) * corrections[i]
        if not tracked:
            left = left * s[i].mean(-1, keepdim=True).sqrt()
        right = torch.where(s[i] > 0, s[i].rsqrt(), torch.zeros_like(s[i]))
        # Multiplied before they are squared: right^2 overflows where gradients are small.
        scaled = gradients[i] * left.unsqueeze(-1) * right.unsqueeze(-2)
        lefts.append(left)
        rights.append(right)
        norms.append(scaled.square().sum(-1).sum(-1).sqrt())
    return lefts, rights, norms


def _is_stored(gradient: Tensor) -> bool:
    return gradient.dim() == 2 and (is_plain(gradient) or is_plain(gradient.mT))


def _are_stored(
    gradients: list[Tensor], q: list[Tensor], s: list[Tensor], *settings: object
) -> bool:
    return bool(gradients) and all(map(_is_stored, gradients)) and fits(*q, *s)


def _are_large(
    gradients: list[Tensor], q: list[Tensor], s: list[Tensor], *settings: object
) -> bool:
    # Together, for they are one call.
    return sum(g.numel() for g in gradients) >= LEAST_ELEMENTS and _are_stored(gradients, q, s)


@two_sided_once_.native(_are_large, mutates=("q", "s"), fits=_are_stored)
def _two_sided_once_(
    gradients: list[Tensor],
    q: list[Tensor],
    s: list[Tensor],
    corrections: list[float],
    fresh: float,
    tracked: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    kernels = library()
    assert kernels is not None
    units, features = [x.numel() for x in q], [x.numel() for x in s]
    lefts = vectors(q[0], units, torch.float32)
    rights = vectors(q[0], features, torch.float32)
    norms = q[0].new_empty(len(q), dtype=torch.float64)
    kernels.neurms_two_sided_once(
        len(q),
        addresses(gradients),
        numbers("q", units),
        numbers("q", features),
        numbers("q", [not gradient.is_contiguous() for gradient in gradients]),
        numbers("f", corrections),
        fresh,
        tracked,
        *map(addresses, (q, s, lefts, rights)),
        norms.data_ptr(),
        threads(),
    )
    increment_version((*q, *s))
    return lefts, rights, list(norms.float().unbind())
