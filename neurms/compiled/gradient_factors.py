"""From a gradient's row and column sums of squares to the factors that scale it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neurms.compiled.backends import Kernel, kernel
from neurms.compiled.lists import list_kernel
from neurms.compiled.native import addresses, are_plain, library, numbers
from neurms.compiled.square_sums import vectors

__all__ = ["factors_of_moments", "gradient_factors", "moved_moments"]


_DOUBLE = frozenset((torch.float64,))


def moved_moments(roots: Tensor, squares: Tensor, beta: float) -> Tensor:
    """Return ``roots^2 + (1 - beta) (squares - roots^2)``, shape (..., k), float64."""
    return torch.lerp(roots.to(torch.float64).square(), squares.to(torch.float64), 1.0 - beta)


def _bounded_inverse_roots(
    moments: Tensor, kappa: float, damping: float, one_sided: bool
) -> Tensor:
    # The least normal number of float32 as a root. What is divided by less has long been zero, and
    # the quotient would overflow.
    dead = moments < 1.1754943508222875e-38**2
    if moments.size(-1) == 0:
        return moments.rsqrt()
    if damping > 0.0:
        moments = (moments + moments.mean(-1, keepdim=True) * damping) / (1.0 + damping)
    inverse = moments.rsqrt()
    median = inverse.masked_fill(dead, float("nan")).nanmedian(-1, True)[0]
    if not one_sided:
        inverse = torch.maximum(inverse, median / kappa)
    return torch.minimum(inverse, median * kappa).masked_fill(dead, 0.0)


def factors_of_moments(
    q: Tensor,
    s: Tensor,
    correction: Tensor,
    kappa: float,
    damping: float = 0.0,
    one_sided: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return ``sqrt(T correction / q_i)`` and ``1 / sqrt(s_j)``, as :func:`gradient_factors` does.

    Args:
        q: Moments of rows, shape (..., m), float64.
        s: Moments of columns, shape (..., n), float64.
        correction: ``1 - beta^t``.
        kappa: Width of the clip.
        damping: How much of their mean moments of columns are taken for, against themselves.
        one_sided: Whether the clip is from above alone.

    Returns:
        Shapes (..., m) and (..., n), float64.
    """
    total = (q.sum(-1, keepdim=True) + s.sum(-1, keepdim=True)) / 2.0
    left = _bounded_inverse_roots(q, kappa, 0.0, one_sided) * (total * correction).sqrt()
    return left, _bounded_inverse_roots(s, kappa, damping, one_sided)


def _factors_of(
    rows: Tensor,
    columns: Tensor,
    q: Tensor,
    s: Tensor,
    correction: Tensor,
    beta: float,
    kappa: float,
    damping: float,
    one_sided: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    new_q, new_s = moved_moments(q, rows, beta), moved_moments(s, columns, beta)
    left, right = factors_of_moments(new_q, new_s, correction, kappa, damping, one_sided)
    return new_q.sqrt().to(q.dtype), new_s.sqrt().to(s.dtype), left.to(q.dtype), right.to(s.dtype)


# The correction changes from step to step: compiled forms get it as a 0-d tensor.
_factors: Kernel[..., Any] = kernel(_factors_of)


@list_kernel
def gradient_factors(
    rows: Sequence[Tensor],
    columns: Sequence[Tensor],
    q: Sequence[Tensor],
    s: Sequence[Tensor],
    corrections: Sequence[float],
    beta: float,
    kappa: float,
    damping: float = 0.0,
    one_sided: bool = False,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Say where averages of sums of squares move, and which factors they give there.

    ``q'_i = beta q_i + (1 - beta) R_i``, s' likewise from C; with ``T = (sum q' + sum s') / 2``,
    ``left_i = sqrt(T correction / q'_i)`` and ``right_j = 1 / sqrt(s'_j)``. ``1 / sqrt(q'_i)`` and
    ``1 / sqrt(s'_j)`` are first bounded to within ``kappa`` of the lower median of their like.
    Where the average is zero the factor is, and has no part in the median. With ``damping`` right
    is of ``(s'_j + damping mean(s')) / (1 + damping)`` in the place of s'. Nothing is written.

    A factor that is raised lengthens the update: ``one_sided`` raises none. With damping the rows
    of ``left_i X_ij right_j``, X with sums R and C and beta 0, then have no more than ``n (1 +
    damping) / damping`` as their sum of squares.

    Args:
        rows: R of every matrix, shape (..., m), float64.
        columns: C of every matrix, shape (..., n), float64.
        q: *Roots* of the averages of R, shape (..., m), float32 or float64.
        s: Roots of the averages of C, shape (..., n).
        corrections: ``1 - beta^t`` of every matrix.
        beta: Decay, in [0, 1).
        kappa: At least 1.
        damping: How much of their mean averages of columns are taken for, against themselves.
        one_sided: Whether factors are bounded from above alone.

    Returns:
        The roots of q' and of s', left (..., m) and right (..., n) of every matrix, with the dtypes
        of q and s. NaN stays NaN.

    Reference:
        NeuRMS's variant P; Adafactor's fit. Roots are kept, because squares of small gradients
        would leave float32's range.

    Example:
        >>> import torch
        >>> q, s = torch.zeros(2), torch.zeros(1)
        >>> r, c = torch.tensor([1.0, 4.0]).double(), torch.tensor([5.0]).double()
        >>> *_, (left,), (right,) = gradient_factors([r], [c], [q], [s], [1.0], 0.0, 10.0)
        >>> left * right
        tensor([1.0000, 0.5000])
    """
    each = zip(rows, columns, q, s, corrections, strict=True)
    made = [_factors(*item, beta, kappa, damping, one_sided) for item in each]
    new_q, new_s, left, right = ([item[k] for item in made] for k in range(4))
    return new_q, new_s, left, right


def _are_vectors(
    rows: Sequence[Tensor],
    columns: Sequence[Tensor],
    q: Sequence[Tensor],
    s: Sequence[Tensor],
    corrections: Sequence[float],
) -> list[bool]:
    if are_plain([*q, *s]) and are_plain([*rows, *columns], _DOUBLE):
        return [a.ndim == 1 for a in rows]
    return [
        a.dim() == 1
        and are_plain([c, d])
        and all(x.dtype is torch.float64 and x.is_cpu and x.is_contiguous() for x in (a, b))
        for a, b, c, d in zip(rows, columns, q, s, strict=True)
    ]


@gradient_factors.native(_are_vectors)
def _gradient_factors(
    rows: Sequence[Tensor],
    columns: Sequence[Tensor],
    q: Sequence[Tensor],
    s: Sequence[Tensor],
    corrections: Sequence[float],
    beta: float,
    kappa: float,
    damping: float = 0.0,
    one_sided: bool = False,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    kernels = library()
    assert kernels is not None
    units, features = list(map(Tensor.numel, q)), list(map(Tensor.numel, s))
    made = vectors(q[0], 2 * (units + features), torch.float32)
    count = len(q)
    parts = [made[:count], made[count : 2 * count], made[2 * count : 3 * count], made[3 * count :]]
    new_q, new_s, left, right = parts
    kernels.neurms_gradient_factors(
        count,
        *map(addresses, (rows, columns, q, s)),
        numbers("q", units),
        numbers("q", features),
        numbers("d", corrections),
        beta,
        kappa,
        damping,
        one_sided,
        *map(addresses, parts),
    )
    return new_q, new_s, left, right
