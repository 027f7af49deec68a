"""From a gradient's row and column sums of squares to the factors that scale it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from neurms.compiled.backends import kernel
from neurms.compiled.native import fits, library
from neurms.compiled.square_sums import addresses, numbers, vectors

__all__ = ["factors_of_moments", "gradient_factors_", "move_roots_"]


def move_roots_(roots: Tensor, squares: Tensor, fresh: float) -> Tensor:
    """Move ``roots`` (..., k) to those of ``roots^2 + fresh (squares - roots^2)``, in place.

    Returns:
        The squares of the moved roots, float64.
    """
    moved = roots.to(torch.float64).square().lerp_(squares.to(torch.float64), fresh)
    roots.copy_(moved.sqrt())
    return roots.to(torch.float64).square()


def _bounded_inverse_roots(moments: Tensor, kappa: float) -> Tensor:
    # The least normal number of float32 as a root. What is divided by less has long been zero, and
    # the quotient would overflow.
    dead = moments < 1.1754943508222875e-38**2
    inverse = moments.rsqrt()
    if inverse.size(-1) == 0:
        return inverse
    median = inverse.masked_fill(dead, float("nan")).nanmedian(-1, True)[0]
    bounded = torch.minimum(torch.maximum(inverse, median / kappa), median * kappa)
    return bounded.masked_fill(dead, 0.0)


def factors_of_moments(
    q: Tensor, s: Tensor, correction: float, kappa: float
) -> tuple[Tensor, Tensor]:
    """Return ``sqrt(T correction / q_i)`` and ``1 / sqrt(s_j)``, as :func:`gradient_factors_` does.

    Args:
        q: Moments of rows, shape (..., m), float64.
        s: Moments of columns, shape (..., n), float64.
        correction: ``1 - beta^t``.
        kappa: Width of the clip.

    Returns:
        Shapes (..., m) and (..., n), float64.
    """
    total = (q.sum(-1, keepdim=True) + s.sum(-1, keepdim=True)) / 2.0
    left = _bounded_inverse_roots(q, kappa) * (total * correction).sqrt()
    return left, _bounded_inverse_roots(s, kappa)


@kernel
def gradient_factors_(
    rows: list[Tensor],
    columns: list[Tensor],
    q: list[Tensor],
    s: list[Tensor],
    corrections: list[float],
    fresh: float,
    kappa: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """Average sums of squares, and make factors of the averages.

    ``q_i <- q_i + fresh (R_i - q_i)``, s likewise from C; with ``T = (sum q + sum s) / 2``,
    ``left_i = sqrt(T correction / q_i)`` and ``right_j = 1 / sqrt(s_j)``. ``1 / sqrt(q_i)`` and
    ``1 / sqrt(s_j)`` are first bounded to within ``kappa`` of the lower median of their like. Where
    the average is zero the factor is, and has no part in the median.

    Args:
        rows: R of every matrix, shape (..., m), float64.
        columns: C of every matrix, shape (..., n), float64.
        q: *Roots* of the averages of R, shape (..., m), float32 or float64; overwritten.
        s: Roots of the averages of C, shape (..., n); overwritten.
        corrections: ``1 - beta^t`` of every matrix.
        fresh: ``1 - beta``.
        kappa: At least 1.

    Returns:
        left (..., m) and right (..., n) of every matrix, with the dtypes of q and s.

    Reference:
        NeuRMS's variant P; Adafactor's fit. Roots are kept, because squares of small gradients
        would leave float32's range.

    Example:
        >>> import torch
        >>> q, s = torch.zeros(2), torch.zeros(1)
        >>> r, c = torch.tensor([1.0, 4.0]).double(), torch.tensor([5.0]).double()
        >>> left, right = gradient_factors_([r], [c], [q], [s], [1.0], 1.0, 10.0)
        >>> left[0] * right[0]
        tensor([1.0000, 0.5000])
    """
    lefts: list[Tensor] = []
    rights: list[Tensor] = []
    for i in range(len(rows)):
        by_row = move_roots_(q[i], rows[i], fresh)
        by_column = move_roots_(s[i], columns[i], fresh)
        left, right = factors_of_moments(by_row, by_column, corrections[i], kappa)
        lefts.append(left.to(q[i].dtype))
        rights.append(right.to(s[i].dtype))
    return lefts, rights


def _are_vectors(
    rows: list[Tensor], columns: list[Tensor], q: list[Tensor], s: list[Tensor], *settings: object
) -> bool:
    sums = all(x.dtype is torch.float64 and x.is_cpu and x.is_contiguous() for x in rows + columns)
    return sums and all(x.dim() == 1 for x in q) and fits(*q, *s)


def _are_worth_it(
    rows: list[Tensor], columns: list[Tensor], q: list[Tensor], s: list[Tensor], *settings: object
) -> bool:
    # Twenty eager calls a matrix are dearer than one native call at any size.
    return sum(x.numel() for x in q) >= 128 and _are_vectors(rows, columns, q, s)


@gradient_factors_.native(_are_worth_it, mutates=("q", "s"), fits=_are_vectors)
def _gradient_factors_(
    rows: list[Tensor],
    columns: list[Tensor],
    q: list[Tensor],
    s: list[Tensor],
    corrections: list[float],
    fresh: float,
    kappa: float,
) -> tuple[list[Tensor], list[Tensor]]:
    kernels = library()
    assert kernels is not None
    units, features = [x.numel() for x in q], [x.numel() for x in s]
    lefts, rights = vectors(q[0], units, torch.float32), vectors(q[0], features, torch.float32)
    kernels.neurms_gradient_factors(
        len(q),
        *map(addresses, (rows, columns, q, s)),
        numbers("q", units),
        numbers("q", features),
        numbers("d", corrections),
        fresh,
        kappa,
        *map(addresses, (lefts, rights)),
    )
    increment_version((*q, *s))
    return lefts, rights
