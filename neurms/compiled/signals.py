"""What NeuRMS does with a signal (D or H) in one go: observe it, foresee its factors, scale it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from neurms.compiled.backends import kernel
from neurms.compiled.native import LEAST_ELEMENTS, fits, library, reads, suits, threads
from neurms.compiled.reductions import sum_of_squares
from neurms.compiled.scaling import inverse_root

__all__ = ["moment_factors_", "observed_signal", "scaled_signal"]


@kernel
def moment_factors_(
    v: Tensor,
    squares: Tensor,
    weight: Tensor,
    beta: float,
    correction: Tensor,
    eps: float,
    v_min: float,
    low: float,
    high: float,
) -> Tensor:
    """Move second moments in place and return the factors that they then give.

    ``v <- beta v + (1 - beta) weight squares``; ``s = clip(max(v / correction + eps, v_min)^(-1/2),
    low, high)``.

    Args:
        v: Second moments, shape (k,), float32 or float64; overwritten.
        squares: Sums of squares, shape (k,); cast to the dtype of ``v``.
        weight: 0-d tensor, what makes a mean of the sums.
        beta: Decay, in [0, 1).
        correction: 0-d tensor, ``1 - beta^t``, or 1 for no bias correction.
        eps: Added inside the root.
        v_min: Floor inside the root.
        low: Smallest factor.
        high: Largest factor.

    Returns:
        s, shape (k,), the dtype of ``v``. NaN stays NaN.

    Reference:
        NeuRMS, v_i with s_i and u_j with c_j.

    Example:
        >>> import torch
        >>> v, one = torch.tensor([1.0]), torch.tensor(1.0)
        >>> moment_factors_(v, torch.tensor([14.0]), one / 2, 0.5, one, 0.0, 0.0, 0.0, 100.0), v
        (tensor([0.5000]), tensor([4.]))
    """
    v.lerp_(squares.to(v.dtype) * weight.to(v.device, v.dtype), 1.0 - beta)
    return inverse_root(v, correction, eps, v_min).clamp_(low, high)


def _never(*args: object) -> bool:
    """No vector is large enough to build a library for."""
    return False


def _are_alike(v: Tensor, squares: Tensor, *settings: object) -> bool:
    return v.dim() == 1 and v.shape == squares.shape and fits(v, squares)


@moment_factors_.native(_never, mutates=("v",), fits=_are_alike)
def _moment_factors_(
    v: Tensor, squares: Tensor, weight: Tensor, beta: float, correction: Tensor, *settings: float
) -> Tensor:
    kernels = library()
    assert kernels is not None
    s = torch.empty_like(v)
    kernels.neurms_moment_factors(
        v.data_ptr(),
        squares.data_ptr(),
        v.numel(),
        float(weight),
        beta,
        float(correction),
        *settings,
        s.data_ptr(),
    )
    increment_version(v)
    return s


def _observed(
    x: Tensor,
    v: Tensor,
    per_row: bool,
    beta: float,
    correction: Tensor,
    eps: float,
    v_min: float,
    low: float,
    high: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    squares = sum_of_squares(x, None)
    moment = squares * x.size(0) if per_row else squares / x.size(0)
    blended = torch.lerp(v, moment, 1.0 - beta)
    s = inverse_root(blended, correction, eps, v_min).clamp_(low, high)
    return squares, x.sum(0, dtype=squares.dtype), blended, s


@kernel
def observed_signal(
    x: Tensor,
    v: Tensor,
    per_row: bool,
    beta: float,
    correction: Tensor,
    eps: float,
    v_min: float,
    low: float,
    high: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Observe a signal and blend what is seen into its second moments, which give its factors.

    With ``q_j = sum_rows x_j^2`` and the moment ``q_j / rows``, or ``rows q_j`` for an error signal
    that a mean over rows has divided: ``v' = beta v + (1 - beta) moment``, ``s = clip(max(v' /
    correction + eps, v_min)^(-1/2), low, high)``.

    Args:
        x: The signal, shape (rows, k), any floating dtype; at least one row.
        v: Second moments, shape (k,), float64 for a float64 ``x``, else float32; left as they are.
        per_row: Whether the moment is ``rows q`` (D of a mean loss) instead of ``q / rows``.
        beta: Decay, in [0, 1).
        correction: 0-d tensor, ``1 - beta^t``, or 1 for no bias correction.
        eps: Added inside the root.
        v_min: Floor inside the root.
        low: Smallest factor.
        high: Largest factor.

    Returns:
        ``(q, sum_rows x, v', s)``, each of shape (k,).

    Reference:
        NeuRMS, buffer scaling. Settled: D is the per-row error, whence ``per_row``. The native form
        reads ``x`` once.

    Example:
        >>> import torch
        >>> x, one = torch.tensor([[3.0], [1.0]]), torch.tensor(1.0)
        >>> for part in observed_signal(x, torch.zeros(1), False, 0.0, one, 0.0, 0.0, 0.0, 1.0):
        ...     print(part.tolist())
        [10.0]
        [4.0]
        [5.0]
        [0.4472135901451111]
    """
    return _observed(x, v, per_row, beta, correction, eps, v_min, low, high)


@kernel
def scaled_signal(
    x: Tensor,
    v: Tensor,
    per_row: bool,
    beta: float,
    correction: Tensor,
    eps: float,
    v_min: float,
    low: float,
    high: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Observe a signal as :func:`observed_signal` does, and scale it by the factors that gives.

    Args:
        x: The signal, shape (rows, k), float32 or float64; at least one row.
        v: Second moments, shape (k,), the same dtype; left as they are.
        per_row: Whether the moment is ``rows q`` (D of a mean loss) instead of ``q / rows``.
        beta: Decay, in [0, 1).
        correction: 0-d tensor, ``1 - beta^t``, or 1 for no bias correction.
        eps: Added inside the root.
        v_min: Floor inside the root.
        low: Smallest factor.
        high: Largest factor.

    Returns:
        ``(q, sum_rows x, v', s, x s)``: four of shape (k,) and one of the shape of ``x``.

    Reference:
        NeuRMS, buffer scaling. Settled: D is the per-row error, whence ``per_row``. The native form
        reads ``x`` from memory once.

    Example:
        >>> import torch
        >>> x, one = torch.tensor([[3.0], [1.0]]), torch.tensor(1.0)
        >>> for part in scaled_signal(x, torch.zeros(1), False, 0.0, one, 0.0, 0.0, 0.0, 1.0):
        ...     print(part.flatten().tolist())
        [10.0]
        [4.0]
        [5.0]
        [0.4472135901451111]
        [1.3416407108306885, 0.4472135901451111]
    """
    squares, total, blended, s = _observed(x, v, per_row, beta, correction, eps, v_min, low, high)
    return squares, total, blended, s, x * s


def _suits(x: Tensor, v: Tensor, *settings: object) -> bool:
    return x.dim() == 2 and v.shape == x.shape[1:] and suits(x, v)


def _fits(x: Tensor, v: Tensor, *settings: object) -> bool:
    return x.dim() == 2 and v.shape == x.shape[1:] and fits(x, v)


def _is_observable(x: Tensor, v: Tensor, *settings: object) -> bool:
    return x.dim() == 2 and v.shape == x.shape[1:] and reads(x) and fits(v)


def _is_worth_it(x: Tensor, v: Tensor, *settings: object) -> bool:
    return x.numel() >= LEAST_ELEMENTS and _is_observable(x, v)


@observed_signal.native(_is_worth_it, fits=_is_observable)
def _observed_signal(
    x: Tensor, v: Tensor, per_row: bool, *settings: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _observed_natively(x, None, v, per_row, *settings)


@scaled_signal.native(_suits, fits=_fits)
def _scaled_signal(
    x: Tensor, v: Tensor, per_row: bool, *settings: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    scaled = torch.empty_like(x)
    return *_observed_natively(x, scaled, v, per_row, *settings), scaled


def _observed_natively(
    x: Tensor,
    scaled: Tensor | None,
    v: Tensor,
    per_row: bool,
    beta: float,
    correction: Tensor,
    *bounds: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernels = library()
    assert kernels is not None
    rows, columns = x.shape
    # Sums apart from the rest: they may become a bias's gradient, which others write.
    vectors, sums = v.new_empty(3, columns), v.new_empty(columns)
    kernels.neurms_scaled_signal(
        x.data_ptr(),
        x.dtype is torch.bfloat16,
        rows,
        columns,
        v.data_ptr(),
        rows if per_row else 1.0 / rows,
        beta,
        float(correction),
        *bounds,
        vectors.data_ptr(),
        sums.data_ptr(),
        None if scaled is None else scaled.data_ptr(),
        threads(),
    )
    squares, blended, s = vectors.unbind()
    return squares, sums, blended, s
