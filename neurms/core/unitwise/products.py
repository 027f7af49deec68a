"""A gradient that is never formed, written into its weight: ``update="backward"``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from neurms.compiled.gemm import bfloat16_gemm_, update_gemm_
from neurms.compiled.update import apply_updates_
from neurms.core.ground.spans import span
from neurms.core.unitwise.moments import Factors
from neurms.core.unitwise.rule import Gemm, UnitwiseRule
from neurms.core.unitwise.statistics import scalar

__all__ = ["Product", "write_product_"]


class Product(NamedTuple):
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
    gemm: Gemm = "float32"
    backend: str = "auto"

    @property
    def in_bfloat16(self) -> bool:
        """Whether the factors are to be bfloat16, or are: then their products are exact."""
        low = torch.bfloat16
        return self.gemm == "bfloat16" or self.errors.dtype is self.activations.dtype is low


def write_product_(
    target: Tensor,
    product: Product,
    factors: Factors,
    rule: UnitwiseRule,
    velocity: Tensor | None,
    rate: float,
    decay: float,
) -> None:
    """Write W <- decay W - rate S D^T H C by one GEMM, or V <- mu V + S D^T H C and W from V.

    Args:
        target: W, shape (m, n); overwritten.
        product: D and H.
        factors: s (m,), and c (n,) or None.
        rule: Where they act.
        velocity: V, shape (m, n), where the rule has momentum.
        rate: Learning rate.
        decay: What is kept of W.
    """
    applied: tuple[Tensor | None, Tensor | None] = (None, None) if rule.upstream else factors
    if velocity is None:
        _write_(target, product, applied, rate, decay)
        return
    # B's factors are in D already, and would be missing where the velocity is scaled again.
    if product.in_bfloat16 and not (rule.coupled and rule.upstream):
        move, rates = bfloat16_gemm_.on(product.backend), (scalar(rate), scalar(decay))
        signals = product.errors, product.activations
        move(target, *signals, *applied, *rates, velocity, scalar(rule.momentum), rule.coupled)
        return
    _write_(velocity, product, applied, -1.0, rule.momentum)
    left, right = factors if rule.coupled else (None, None)
    apply_updates_([target], [velocity], [None], [left], [right], [rate], [decay])


def _write_(
    target: Tensor,
    product: Product,
    factors: tuple[Tensor | None, Tensor | None],
    rate: float,
    decay: float,
) -> None:
    """Write T <- decay T - rate S D^T H C."""
    errors, activations, scaled, _, backend = product
    if product.in_bfloat16:
        move = bfloat16_gemm_.on(backend)
        move(target, errors, activations, *factors, scalar(rate), scalar(decay))
        return
    wide = target.dtype
    if scaled is None or scaled[0].dtype != wide:
        s, c = factors
        with span("scale"):
            d = errors.to(wide) if s is None else errors.to(wide) * s.to(wide)
            h = activations.to(wide) if c is None else activations.to(wide) * c.to(wide)
        scaled = d, h
    update_gemm_(target, *scaled, rate, decay)
