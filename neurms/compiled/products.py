"""Products of float32 matrices at the speed of the processor's widest vectors.

``x @ y`` calls torch's BLAS library, MKL, which keeps to 256 bits on AMD's processors. oneDNN,
which torch ships as well, multiplies with 512: on Zen 5 in half of the time. It is called through
the operator that TorchInductor takes for linear layers, where :func:`wide_float32` holds. The
choice depends on the processor, torch's flags, shapes and dtypes, never on timing: a resumed run
computes what an uninterrupted one would.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.jit import is_scripting  # type: ignore[attr-defined]

from neurms.compiled.native import PLAIN, wide_float32

__all__ = ["LEAST_PRODUCTS", "LEAST_SIDE", "addmm_", "product"]

LEAST_PRODUCTS = 1 << 21
"""Multiplications from which oneDNN's longer call is earned back: 128 x 128 x 128 takes .87 of
MKL's time, 96 x 96 x 96 1.25 of it (one thread, AMD EPYC of family 26)."""
LEAST_SIDE = 8
"""Fewer rows or columns are products with vectors, which wait for memory."""


def product(x: Tensor, y: Tensor) -> Tensor:
    """Return ``x @ y``, by oneDNN where that is faster.

    A kernel of TorchScript may call it, whose form takes ``x @ y``, as do graphs of torch.compile,
    batches, other dtypes and operands of which a gradient is recorded.

    Args:
        x: Shape (..., m, k), any strides.
        y: Shape (..., k, n), any strides.

    Returns:
        Shape (..., m, n), contiguous where it is oneDNN's.

    Raises:
        RuntimeError: The shapes do not fit.

    Example:
        >>> import torch
        >>> product(torch.ones(2, 3), torch.ones(3, 1))
        tensor([[3.],
                [3.]])
    """
    # TorchScript leaves out what stands under this condition alone.
    if not is_scripting():  # noqa: SIM102
        if _serves(x, y):
            return _multiplied(x, y)
    return x @ y


def addmm_(total: Tensor, x: Tensor, y: Tensor, keep: float, share: float) -> Tensor:
    """Bring ``total`` to ``keep total + share x @ y``, by oneDNN where that is faster.

    Args:
        total: Shape (m, n), any strides; overwritten; with ``keep`` = 0 whatever it holds.
        x: Shape (m, k).
        y: Shape (k, n).
        keep: Factor of what is there.
        share: Factor of the product.

    Returns:
        ``total``.

    Example:
        >>> import torch
        >>> addmm_(torch.ones(1, 1), torch.ones(1, 3), torch.ones(3, 1), 0.5, 2.0)
        tensor([[6.5000]])
    """
    # TorchScript leaves out what stands under this condition alone.
    if not is_scripting():  # noqa: SIM102
        if _serves(x, y):
            made = _multiplied(x, y)
            if keep == 0.0:
                return total.copy_(made if share == 1.0 else made.mul_(share))
            if keep != 1.0:
                total.mul_(keep)
            return total.add_(made, alpha=share)
    return total.addmm_(x, y, beta=keep, alpha=share)


def _serves(x: Tensor, y: Tensor) -> bool:
    if torch.compiler.is_compiling() or x.numel() * y.shape[-1] < LEAST_PRODUCTS:
        return False
    return (
        _is_matrix(x)
        and _is_matrix(y)
        and x.shape[1] == y.shape[0]
        and min(x.shape[0], y.shape[1]) >= LEAST_SIDE
        and not (torch.is_grad_enabled() and (x.requires_grad or y.requires_grad))
        and wide_float32()
        and _may_call()
    )


def _is_matrix(x: Tensor) -> bool:
    return x.ndim == 2 and x.dtype is torch.float32 and x.is_cpu and type(x) in PLAIN


def _may_call() -> bool:
    """Return whether oneDNN is built in and on, and no autocast would lower the precision."""
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    on: Any = torch.backends.mkldnn.enabled  # a bool, which is typed as what makes it
    return there and bool(on) and not torch.is_autocast_enabled("cpu")


def _multiplied(x: Tensor, y: Tensor) -> Tensor:
    x, w = _dense(x), _dense(y.mT)
    made: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, w, None, "none", [], "")
    return made


def _dense(x: Tensor) -> Tensor:
    """Return a matrix without gaps between its rows or columns: others end in a plain loop."""
    if x.is_contiguous() or x.mT.is_contiguous():
        return x
    # Along what lies together, as a copy across it costs more.
    return x.mT.contiguous().mT if x.stride(0) == 1 else x.contiguous()
