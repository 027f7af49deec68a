"""A gradient that is never formed: D^T H, as backward shows the two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from neurms.compiled.backends import scalar
from neurms.compiled.gemm import scaled_gemm_, update_gemm_
from neurms.compiled.native import wide_float32
from neurms.core.ground.spans import span

__all__ = ["Product", "add_product_", "fused_in", "square_norm"]

_TILE = 1 << 16
"""Elements of a gradient that are looked at together."""


@dataclass(slots=True)
class Product:
    """A gradient that is not formed: D^T H.

    Args:
        errors: D, shape (rows, m), already multiplied by S for variant B.
        activations: H, shape (rows, n).
        scaled: D S and H C where they are at hand already.
        gemm: What they are multiplied in.
        backend: How kernels run.
    """

    errors: Tensor
    activations: Tensor
    scaled: tuple[Tensor, Tensor] | None = None
    gemm: Literal["float32", "bfloat16"] = "float32"
    backend: str = "auto"


def fused_in(gemm: str, errors: Tensor, activations: Tensor) -> torch.dtype | None:
    """Return in what D and H are multiplied where one kernel multiplies, scales and moves.

    D S and H C are not needed there. bfloat16 where D and H are to be that, or are, so that their
    products are exact; float32 where the processor multiplies it faster than torch does.

    Args:
        gemm: What D and H are multiplied in.
        errors: D.
        activations: H.

    Returns:
        None where D S and H C are multiplied by torch.
    """
    if gemm == "bfloat16" or errors.dtype is activations.dtype is torch.bfloat16:
        return torch.bfloat16
    both = errors.dtype is activations.dtype is torch.float32
    return torch.float32 if both and wide_float32() else None


def add_product_(
    target: Tensor,
    product: Product,
    factors: tuple[Tensor | None, Tensor | None],
    rate: float,
    decay: float,
) -> None:
    """Write T <- decay T - rate S D^T H C.

    Args:
        target: T, shape (m, n); overwritten.
        product: D and H.
        factors: s (m,) and c (n,), None for 1.
        rate: A number.
        decay: A number.
    """
    errors, activations, scaled = product.errors, product.activations, product.scaled
    precision = fused_in(product.gemm, errors, activations)
    if precision is not None:
        move, rates = scaled_gemm_.on(product.backend), (scalar(rate), scalar(decay))
        low = precision is torch.bfloat16
        move(target, errors, activations, *factors, *rates, None, None, False, low)
        return
    wide = target.dtype
    if scaled is None and factors[0] is None and factors[1] is None:
        # The product's own casts serve, and make no copies where there is nothing to cast.
        scaled = errors, activations
    elif scaled is None or scaled[0].dtype != wide:
        s, c = factors
        with span("scale"):
            d = errors.to(wide) if s is None else errors.to(wide) * s.to(wide)
            h = activations.to(wide) if c is None else activations.to(wide) * c.to(wide)
        scaled = d, h
    update_gemm_(target, *scaled, rate, decay)


def square_norm(product: Product, weight: Tensor, decay: float, sign: float) -> Tensor:
    """Return ||sign D^T H + decay W||_F^2, a few rows of the gradient at a time.

    Args:
        product: D and H.
        weight: W, shape (m, n).
        decay: What of W is added.
        sign: 1, or -1 to ascend.

    Returns:
        A 0-d float64 tensor.
    """
    m, n = weight.shape
    d, h = product.errors.to(weight.dtype).mT, product.activations.to(weight.dtype)
    height = max(1, _TILE // max(n, 1))
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    for row in range(0, m, height):
        part = d[row : row + height] @ h
        if decay:
            part.mul_(sign).add_(weight[row : row + height], alpha=decay)
        total += torch.linalg.vector_norm(part, dtype=torch.float64).square()
    return total
