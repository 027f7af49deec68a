"""The weight's update as one matrix product, without a gradient in between.

One call of the BLAS library leaves nothing to fuse, so these are plain functions and no kernels:
they are the same on every backend. ``addmm_`` takes its coefficients as numbers; a 0-d tensor is
read with ``float``, which on an accelerator waits for the device.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_NOTHING: AbstractContextManager[None] = nullcontext()


def update_gemm_(
    w: Tensor,
    errors: Tensor,
    activations: Tensor,
    lr: float | Tensor,
    decay: float | Tensor = 1.0,
) -> Tensor:
    """Descend along a gradient that is never formed, in place.

    ``W <- decay W - lr D^T H`` with D and H already scaled, so D S and H C of the layer.

    Args:
        w: The weight, shape (m, n), any strides; overwritten.
        errors: Scaled D, shape (rows, m); cast to the dtype of ``w``.
        activations: Scaled H, shape (rows, n); cast to the dtype of ``w``. No rows only decay.
        lr: A number or a 0-d tensor.
        decay: A number or a 0-d tensor, ``1 - lr * weight_decay``.

    Returns:
        ``w``.

    Raises:
        ValueError: If the shapes do not fit; nothing is changed then.

    Reference:
        NeuRMS, ``update="backward"``.

    Example:
        >>> import torch
        >>> update_gemm_(torch.ones(1, 2), torch.ones(3, 1), torch.ones(3, 2), lr=0.25)
        tensor([[0.2500, 0.2500]])
    """
    rows = errors.shape[0] if errors.dim() == 2 else -1
    if errors.shape != (rows, w.shape[0]) or activations.shape != (rows, w.shape[1]):
        raise ValueError(
            f"errors {tuple(errors.shape)} and activations {tuple(activations.shape)} do not "
            f"multiply to w {tuple(w.shape)}; pass (rows, m) and (rows, n), batch axes flattened"
        )
    # The context costs more than a small product.
    with torch.no_grad() if torch.is_grad_enabled() else _NOTHING:
        return w.addmm_(
            errors.t().to(w.dtype), activations.to(w.dtype), beta=float(decay), alpha=-float(lr)
        )


def accumulate_gemm_(
    velocity: Tensor, errors: Tensor, activations: Tensor, momentum: float | Tensor
) -> Tensor:
    """Add a gradient that is never formed to the velocity, in place.

    ``V <- momentum V + D^T H``; then :func:`~neurms.compiled.update.scaled_update_` with the
    velocity as its gradient moves the weight.

    Args:
        velocity: Shape (m, n), zeros before the first step; overwritten.
        errors: Scaled D, shape (rows, m); cast to the dtype of ``velocity``.
        activations: Scaled H, shape (rows, n); cast to the dtype of ``velocity``.
        momentum: A number or a 0-d tensor.

    Returns:
        ``velocity``.

    Raises:
        ValueError: If the shapes do not fit; nothing is changed then.

    Reference:
        NeuRMS, ``update="backward"`` with momentum.

    Example:
        >>> import torch
        >>> accumulate_gemm_(torch.ones(1, 2), torch.ones(3, 1), torch.ones(3, 2), momentum=0.5)
        tensor([[3.5000, 3.5000]])
    """
    return update_gemm_(velocity, errors, activations, lr=-1.0, decay=momentum)
