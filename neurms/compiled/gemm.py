"""The weight's update as one matrix product, without a gradient in between.

One call of the BLAS library leaves nothing to fuse, so :func:`update_gemm_` is a plain function and
no kernel: it is the same on every backend. ``addmm_`` takes its coefficients as numbers; a 0-d
tensor is read with ``float``, which on an accelerator waits for the device. Where the processor
multiplies faster than that library does, :func:`scaled_gemm_` has a native form, which applies the
factors to the sums on their way into the weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from neurms.compiled.backends import kernel
from neurms.compiled.native import (
    LEAST_ELEMENTS,
    addresses,
    are_plain,
    bfloat16_engine,
    fits,
    is_plain,
    library,
    reads,
    threads,
    wide_float32,
)

__all__ = ["scaled_gemm_", "update_gemm_"]


def update_gemm_(
    w: Tensor,
    errors: Tensor,
    activations: Tensor,
    lr: float | Tensor,
    decay: float | Tensor = 1.0,
) -> Tensor:
    """Descend along a gradient that is never formed, in place.

    ``W <- decay W - lr D^T H`` with D and H already scaled, so D S and H C of the layer. A velocity
    takes it by ``lr=-1`` and its momentum for ``decay``.

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
    if torch.is_grad_enabled():
        with torch.no_grad():
            return update_gemm_(w, errors, activations, lr, decay)
    if errors.dtype is not w.dtype:
        errors = errors.to(w.dtype)
    if activations.dtype is not w.dtype:
        activations = activations.to(w.dtype)
    return w.addmm_(errors.t(), activations, beta=float(decay), alpha=-float(lr))


@kernel
def scaled_gemm_(
    w: Tensor,
    errors: Tensor,
    activations: Tensor,
    s: Tensor | None,
    c: Tensor | None,
    lr: Tensor,
    decay: Tensor,
    velocity: Tensor | None = None,
    momentum: Tensor | None = None,
    scale_velocity: bool = False,
    bfloat16: bool = False,
) -> Tensor:
    """Descend along a scaled gradient that is never formed, in place.

    ``W <- decay W - lr S (D^T H) C``. With a velocity, ``V <- momentum V + S (D^T H) C`` and
    ``W <- decay W - lr V``, or with ``scale_velocity`` ``W <- decay W - lr S V C``. With
    ``bfloat16`` D and H are rounded to it (unless they are already) and their products summed in
    the weight's precision: as a GEMM of bfloat16 operands does it, but that the result is never
    rounded.

    Args:
        w: The weight, shape (m, n), float32 or float64; overwritten.
        errors: D, shape (rows, m).
        activations: H, shape (rows, n).
        s: Unit factors, shape (m,), or None for 1.
        c: Feature factors, shape (n,), or None for 1.
        lr: 0-d tensor.
        decay: 0-d tensor, ``1 - lr * weight_decay``.
        velocity: Shape (m, n), zeros before the first step, or None; overwritten.
        momentum: 0-d tensor; None is 0.
        scale_velocity: Apply the factors to the velocity as well.
        bfloat16: Multiply bfloat16 numbers, not those of the weight's precision.

    Returns:
        ``w``.

    Reference:
        NeuRMS, ``update="backward"``. The native form reads and writes ``w`` and ``velocity``
        once. It multiplies bfloat16 numbers with the matrix unit of the processor (AMX) or its
        bfloat16 vectors, and float32 with vectors of 512 bits where torch's BLAS library uses
        shorter ones.

    Example:
        >>> import torch
        >>> one = torch.tensor(1.0)
        >>> d, h, s = torch.ones(3, 1), torch.full((3, 2), 1.0 + 2**-9), torch.tensor([2.0])
        >>> scaled_gemm_(torch.ones(1, 2), d, h, s, None, one, one, bfloat16=True)
        tensor([[-5., -5.]])
    """
    d, h = errors, activations
    if bfloat16:
        d, h = d.to(torch.bfloat16), h.to(torch.bfloat16)
    d, h = d.to(w.dtype), h.to(w.dtype)
    if s is not None:
        d = d * s.to(w.dtype)
    if c is not None:
        h = h * c.to(w.dtype)
    if velocity is None:
        return w.addmm_(d.t(), h, beta=float(decay), alpha=-float(lr))
    velocity.addmm_(d.t(), h, beta=0.0 if momentum is None else float(momentum))
    moved = velocity
    if scale_velocity and s is not None:
        moved = moved * s.to(w.dtype).unsqueeze(1)
    if scale_velocity and c is not None:
        moved = moved * c.to(w.dtype)
    return w.mul_(decay).sub_(moved * lr.to(w.dtype))


# Its coefficients are read as numbers, which a graph cannot hold; one call of BLAS gains nothing.
scaled_gemm_.keep_eager_on_inductor()


_FLOATS = 3
"""The engine that multiplies float32; others have :func:`bfloat16_engine`'s number."""

_NARROWEST = 32
"""Units of a weight whose float32 product is worth it: narrower ones fill the tiles badly."""


def _multiplies(
    w: Tensor,
    errors: Tensor,
    activations: Tensor,
    s: Tensor | None,
    c: Tensor | None,
    lr: Tensor,
    decay: Tensor,
    velocity: Tensor | None = None,
    momentum: Tensor | None = None,
    scale_velocity: bool = False,
    bfloat16: bool = False,
) -> bool:
    if w.ndim != 2 or errors.ndim != 2 or 0 in (*w.shape, *errors.shape):
        return False
    if velocity is not None and velocity.shape != w.shape:
        return False
    if not bfloat16:
        plain = [x for x in (w, errors, activations, s, c, velocity) if x is not None]
        return w.shape[0] >= _NARROWEST and are_plain(plain) and wide_float32()
    if errors.dtype != activations.dtype or not bfloat16_engine():
        return False
    return is_plain(w) and reads(errors, activations) and fits(s, c, velocity)


def _is_worth_it(w: Tensor, *others: Any) -> bool:
    return w.numel() >= LEAST_ELEMENTS and _multiplies(w, *others)


@scaled_gemm_.native(_is_worth_it, mutates=("w", "velocity"), fits=_multiplies, returns="w")
def _scaled_gemm_(
    w: Tensor,
    errors: Tensor,
    activations: Tensor,
    s: Tensor | None,
    c: Tensor | None,
    lr: Tensor,
    decay: Tensor,
    velocity: Tensor | None,
    momentum: Tensor | None,
    scale_velocity: bool,
    bfloat16: bool,
) -> Tensor:
    kernels = library()
    assert kernels is not None
    done = kernels.neurms_update_gemm(
        addresses([w, velocity, errors, activations, s, c]),
        *w.shape,
        errors.shape[0],
        errors.dtype is torch.bfloat16,
        float(lr),
        float(decay),
        0.0 if momentum is None else float(momentum),
        scale_velocity,
        bfloat16_engine() if bfloat16 else _FLOATS,
        threads(),
    )
    if not done:
        raise MemoryError(
            f"no memory for another copy of {errors.shape[0]} rows of errors and activations; use "
            "smaller batches, and call optimizer.zero_grad() before the next one"
        )
    increment_version(w if velocity is None else (w, velocity))
    return w
