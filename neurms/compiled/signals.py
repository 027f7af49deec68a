"""What NeuRMS does with a signal (D or H) in one go: observe it, foresee its factors, scale it."""

from __future__ import annotations

import torch
from torch import Tensor

from neurms.compiled.backends import kernel
from neurms.compiled.moments import averaged, bounded_roots
from neurms.compiled.native import LEAST_ELEMENTS, is_plain, is_signal, library, threads
from neurms.compiled.reductions import sum_of_squares

__all__ = ["scaled_signal"]


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
    scale: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Observe a signal, blend it into its second moments, and scale it by the factors they give.

    With ``q_j = sum_rows x_j^2`` the moment is ``q_j / rows``, or ``rows q_j`` for an error signal
    that a mean over rows has divided; what comes of it is what
    :func:`~neurms.compiled.moments.move_moments` makes of it.

    Args:
        x: The signal, shape (rows, k), any floating dtype; at least one row.
        v: Second moments, shape (k,), float64 for a float64 ``x``, else float32; left as they are.
        per_row: Whether the moment is ``rows q`` (D of a mean loss) instead of ``q / rows``.
        beta: Decay, in [0, 1).
        correction: A number or a 0-d tensor, ``1 - beta^t``, or 1 for no bias correction.
        eps: Added inside the root.
        v_min: Floor inside the root.
        low: Smallest factor.
        high: Largest factor.
        scale: Whether ``x s`` is wanted.

    Returns:
        ``(q, sum_rows x, v', s, x s)``: four of shape (k,) and one of the shape of ``x``, which is
        empty unless ``scale``.

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
    squares = sum_of_squares(x, None)
    blended = averaged(v, squares * x.size(0) if per_row else squares / x.size(0), beta)
    s = bounded_roots(blended, correction, eps, v_min, low, high)
    total = x.sum(0, dtype=squares.dtype)
    return squares, total, blended, s, x * s if scale else x.new_empty(0)


def _is_observable(x: Tensor, v: Tensor, *settings: object) -> bool:
    if x.ndim != 2 or v.shape != x.shape[1:]:
        return False
    # What is scaled keeps its dtype.
    seen = is_plain(x) if settings[-1] else is_signal(x)
    return seen and is_plain(v) and library() is not None


def _is_worth_it(x: Tensor, v: Tensor, *settings: object) -> bool:
    return x.numel() >= LEAST_ELEMENTS and _is_observable(x, v, *settings)


@scaled_signal.native(_is_worth_it, fits=_is_observable)
def _scaled_signal(
    x: Tensor,
    v: Tensor,
    per_row: bool,
    beta: float,
    correction: Tensor,
    eps: float,
    v_min: float,
    low: float,
    high: float,
    scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    kernels = library()
    assert kernels is not None
    rows, columns = x.shape
    # Sums apart from the rest: they may become a bias's gradient, which others write.
    vectors, sums = v.new_empty(3, columns), v.new_empty(columns)
    scaled = torch.empty_like(x) if scale else x.new_empty(0)
    kernels.neurms_scaled_signal(
        x.data_ptr(),
        x.dtype is torch.bfloat16,
        rows,
        columns,
        v.data_ptr(),
        rows if per_row else 1.0 / rows,
        beta,
        float(correction),
        *(eps, v_min, low, high),
        vectors.data_ptr(),
        sums.data_ptr(),
        scaled.data_ptr() if scale else None,
        threads(),
    )
    squares, blended, s = vectors.unbind()
    return squares, sums, blended, s, scaled
