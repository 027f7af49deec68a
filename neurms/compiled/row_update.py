"""RMNP's step in one walk over the rows of weight, momentum and gradient."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from neurms.compiled.backends import kernel
from neurms.compiled.native import library, suits, threads
from neurms.compiled.normalization import row_norms

__all__ = ["row_normalized_update_"]


@kernel
def row_normalized_update_(
    w: Tensor,
    momentum: Tensor,
    gradient: Tensor,
    mu: float,
    nesterov: bool,
    step: Tensor,
    decay: Tensor,
    floor: float,
) -> Tensor:
    """Average the gradient and move every row of the weight by a vector of length ``step``.

    ``M <- mu M + (1 - mu) G``; ``R = (1 - mu) G + mu M`` with ``nesterov``, else ``M``; then
    ``W_i <- decay W_i - step R_i / max(||R_i||, floor)``.

    Args:
        w: The weight, shape (m, n); overwritten.
        momentum: M, the same shape; overwritten.
        gradient: G, the same shape; left as it is.
        mu: Decay of the average.
        nesterov: Look ahead.
        step: 0-d tensor, the learning rate times any constant factor.
        decay: 0-d tensor, ``1 - lr * weight_decay``.
        floor: Least row norm; rows of zeros stay where they are.

    Returns:
        ``w``.

    Reference:
        RMNP, arXiv 2603.20527, and its authors' code. The native form reads each operand once: a
        row is still in cache when its norm is known. Where all three are stored by columns, as
        Keras has its kernels, it takes two walks.

    Example:
        >>> import torch
        >>> w, m, g = torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])
        >>> row_normalized_update_(w, m, g, 0.5, True, torch.tensor(1.0), torch.tensor(1.0), 1e-12)
        tensor([[-0.6000, -0.8000]])
    """
    momentum.lerp_(gradient, 1.0 - mu)
    ahead = torch.lerp(gradient, momentum, mu) if nesterov else momentum
    unit = ahead / row_norms(ahead).clamp(min=floor)
    return w.mul_(decay.to(w.device, w.dtype)).sub_(unit.mul_(step.to(w.device, w.dtype)))


# torch 2.13's C++ code generator fails (KeyError: 'buf9') where one loop reads the old momentum and
# writes the weight; as_strided in between compiles, and gives wrong numbers for some strides.
row_normalized_update_.keep_eager_on_inductor()


def _suits(w: Tensor, momentum: Tensor, gradient: Tensor, *settings: object) -> bool:
    return suits(w, momentum, gradient) or suits(w.mT, momentum.mT, gradient.mT)


@row_normalized_update_.native(_suits, mutates=("w", "momentum"), returns="w")
def _row_normalized_update_(
    w: Tensor,
    momentum: Tensor,
    gradient: Tensor,
    mu: float,
    nesterov: bool,
    step: Tensor,
    decay: Tensor,
    floor: float,
) -> Tensor:
    kernels = library()
    assert kernels is not None
    by_rows = w.is_contiguous()
    update = (
        kernels.neurms_row_normalized_update
        if by_rows
        else kernels.neurms_row_normalized_update_transposed
    )
    update(
        w.data_ptr(),
        momentum.data_ptr(),
        gradient.data_ptr(),
        *(w if by_rows else w.mT).shape,
        mu,
        nesterov,
        float(step),
        float(decay),
        floor,
        threads(),
    )
    increment_version((w, momentum))
    return w
