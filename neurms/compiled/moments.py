"""Second moments and the scale factors that they give: vectors of m or n numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neurms.compiled.backends import Kernel, kernel
from neurms.compiled.lists import list_kernel
from neurms.compiled.native import addresses, are_plain, library, numbers

__all__ = ["ema_", "moment_factors", "move_moments"]


def averaged(v: Tensor, sample: Tensor, beta: float) -> Tensor:
    """Return ``beta v + (1 - beta) sample``."""
    return torch.lerp(v, sample.to(v.dtype), 1.0 - beta)


def bounded_roots(
    v: Tensor,
    correction: Tensor,
    eps: float,
    v_min: float,
    low: float,
    high: float,
    kappa: float | None = None,
) -> Tensor:
    """Return ``clip(max(v / correction + eps, v_min)^(-1/2))``, as :func:`moment_factors` does."""
    s = (v / correction).add_(eps).clamp_(min=v_min).rsqrt_()
    if kappa is None:
        return s.clamp_(low, high)
    if s.numel() == 0:
        return s
    # Of each layer by itself where several are stacked.
    median = s.median(-1, True)[0]
    return torch.minimum(torch.maximum(s, median / kappa), median * kappa)


def _moved_vector(
    v: Tensor,
    squares: Tensor,
    weight: Tensor,
    correction: Tensor,
    beta: float,
    eps: float,
    v_min: float,
    low: float,
    high: float,
    kappa: float | None,
) -> tuple[Tensor, Tensor]:
    moved = averaged(v, squares.to(v.dtype) * weight, beta)
    return moved, bounded_roots(moved, correction, eps, v_min, low, high, kappa)


# Numbers that change from step to step go as they are; compiled forms get them as 0-d tensors.
_move: Kernel[..., Any] = kernel(_moved_vector)
_factors: Kernel[..., Any] = kernel(bounded_roots)


@list_kernel
def move_moments(
    moments: Sequence[Tensor],
    squares: Sequence[Tensor],
    weights: Sequence[float],
    corrections: Sequence[float],
    beta: float,
    eps: float,
    v_min: float,
    low: float,
    high: float,
    kappa: float | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Say where second moments move, and which factors they give there.

    ``v' = beta v + (1 - beta) weight squares``; ``s = clip(max(v' / correction + eps,
    v_min)^(-1/2), low, high)``. Nothing is written: who commits copies v', who foresees does not.

    Args:
        moments: v of each layer, shape (k,), float32 or float64.
        squares: Its sums of squares, shape (k,); cast to the dtype of v.
        weights: What makes a mean of them.
        corrections: Its ``1 - beta^t``, or 1 for no bias correction.
        beta: Decay, in [0, 1).
        eps: Added inside the root.
        v_min: Floor inside the root.
        low: Smallest factor.
        high: Largest factor.
        kappa: At least 1; bounds factors by ``[median(s) / kappa, median(s) kappa]`` of their own
            layer instead, of two middle ones the lower. None bounds by ``low`` and ``high``.

    Returns:
        v' and s of each layer, of the shape and dtype of v. NaN stays NaN, and with ``kappa``
        makes every factor of its layer NaN.

    Reference:
        NeuRMS, v_i with s_i and u_j with c_j. Settled: correction 1 is Algorithm 1. ``kappa`` is
        not in the draft, whose absolute bounds mean something else in every layer and for every
        loss; it does not change when all errors are multiplied by a constant (with eps = 0).

    Example:
        >>> import torch
        >>> v, q = [torch.tensor([1.0]), torch.tensor([0.0, 0.0])], [torch.ones(1), torch.ones(2)]
        >>> moved, s = move_moments(v, q, [7.0, 0.5], [1.0, 0.5], 0.5, 0.0, 0.0, 0.0, 100.0)
        >>> moved, s
        ([tensor([4.]), tensor([0.2500, 0.2500])], [tensor([0.5000]), tensor([1.4142, 1.4142])])
    """
    root = (beta, eps, v_min, low, high, kappa)
    made = [
        _move(v, q, weight, correction, *root)
        for v, q, weight, correction in zip(moments, squares, weights, corrections, strict=True)
    ]
    return [v for v, _ in made], [s for _, s in made]


@list_kernel
def moment_factors(
    moments: Sequence[Tensor],
    corrections: Sequence[float],
    eps: float,
    v_min: float,
    low: float,
    high: float,
    kappa: float | None = None,
) -> list[Tensor]:
    """Return the factors of second moments as they are.

    Args:
        moments: v of each layer, shape (k,), or (..., k) for layers that are stacked.
        corrections: Its ``1 - beta^t``, or 1 for no bias correction.
        eps: Added inside the root.
        v_min: Floor inside the root.
        low: Smallest factor.
        high: Largest factor.
        kappa: As for :func:`move_moments`.

    Returns:
        s of each layer, of the shape and dtype of v.

    Reference:
        NeuRMS, s_i and c_j.

    Example:
        >>> import torch
        >>> moment_factors([torch.tensor([4.0, 0.0])], [1.0], 0.0, 1e-12, 0.0, 100.0)
        [tensor([  0.5000, 100.0000])]
        >>> moment_factors([torch.tensor([1.0, 1.0, 1e-8])], [1.0], 0.0, 1e-12, 0.0, 0.0, 10.0)
        [tensor([ 1.,  1., 10.])]
    """
    root = (eps, v_min, low, high, kappa)
    return [_factors(v, t, *root) for v, t in zip(moments, corrections, strict=True)]


def _are_vectors(
    moments: Sequence[Tensor], squares: Sequence[Tensor], *numbers: object
) -> list[bool]:
    """Return which items the native form serves."""
    if are_plain([*moments, *squares]):
        return [v.ndim == 1 and v.shape == q.shape for v, q in zip(moments, squares, strict=True)]
    return [
        v.ndim == 1 and v.shape == q.shape and are_plain((v, q))
        for v, q in zip(moments, squares, strict=True)
    ]


@move_moments.native(_are_vectors)
def _move_moments(
    moments: Sequence[Tensor],
    squares: Sequence[Tensor],
    weights: Sequence[float],
    corrections: Sequence[float],
    beta: float,
    *root: Any,
) -> tuple[list[Tensor], list[Tensor]]:
    moved, factors = _fresh(moments, 2)
    given = addresses(squares), numbers("d", weights), addresses(moved)
    _run(moments, given, factors, corrections, beta, *root)
    return moved, factors


@moment_factors.native(lambda moments, corrections: _are_vectors(moments, moments))
def _moment_factors(
    moments: Sequence[Tensor], corrections: Sequence[float], *root: Any
) -> list[Tensor]:
    (factors,) = _fresh(moments, 1)
    _run(moments, (None, None, None), factors, corrections, 1.0, *root)
    return factors


def _fresh(moments: Sequence[Tensor], count: int) -> list[list[Tensor]]:
    """Return as many lists of vectors like ``moments``, all parts of one new tensor."""
    sizes = list(map(Tensor.numel, moments))
    parts = list(moments[0].new_empty(count * sum(sizes)).split(sizes * count))
    return [parts[i * len(sizes) : (i + 1) * len(sizes)] for i in range(count)]


def _run(
    moments: Sequence[Tensor],
    given: tuple[bytes | None, bytes | None, bytes | None],
    factors: Sequence[Tensor],
    corrections: Sequence[float],
    beta: float,
    eps: float,
    v_min: float,
    low: float,
    high: float,
    kappa: float | None,
) -> None:
    squares, weights, moved = given
    kernels = library()
    assert kernels is not None
    kernels.neurms_move_moments(
        len(moments),
        addresses(moments),
        squares,
        numbers("q", map(Tensor.numel, moments)),
        weights,
        numbers("d", corrections),
        beta,
        eps,
        v_min,
        low,
        high,
        kappa or 0.0,
        moved,
        addresses(factors),
    )


@kernel
def ema_(v: Tensor, sample: Tensor, beta: float) -> Tensor:
    """Exponential moving average, in place.

    ``v <- beta v + (1 - beta) sample``.

    Args:
        v: Any shape, float32 or float64; overwritten.
        sample: The same shape; cast to the dtype of ``v``.
        beta: In [0, 1). A number, not a tensor: ``1 - beta`` in float32 loses four digits.

    Returns:
        ``v``.

    Example:
        >>> import torch
        >>> ema_(torch.tensor([1.0]), torch.tensor([3.0]), 0.5)
        tensor([2.])
    """
    return v.copy_(averaged(v, sample, beta))
