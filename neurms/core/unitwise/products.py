"""A gradient that is never formed, written into its weight: ``update="backward"``."""

from __future__ import annotations

import zlib
from typing import NamedTuple

import torch
from torch import Tensor

from neurms.compiled.gemm import scaled_gemm_
from neurms.compiled.move_square_sums import move_square_sums
from neurms.compiled.update import apply_updates_
from neurms.core.ground.precision import compute_dtype
from neurms.core.taps.products import Product, add_product_, fused_in
from neurms.core.unitwise.lengths import Length, gains_
from neurms.core.unitwise.rule import UnitwiseRule
from neurms.core.unitwise.statistics import Factors, scalar
from neurms.core.unitwise.tapped import TappedLayer

__all__ = ["PROBES", "ProbedLength", "length_of", "write_product_"]

PROBES = 4
"""Probes of a gradient that is not formed: what its square norm is told by."""


class ProbedLength(NamedTuple):
    """The length of updates that are not formed, and the seed of the probes of this one."""

    length: Length
    seed: int


def length_of(layer: TappedLayer) -> ProbedLength:
    """Return the length of a layer's updates, before its commit.

    Its probes come from the state's seed, or the layer's name without one, and the number of the
    step, so that a resumed run draws those of an uninterrupted one.
    """
    state, weight = layer.state, layer.weight
    step = state["step"] + 1
    own = state.get("seed", zlib.crc32(layer.name.encode()))
    seed = (own * 1_000_003 + step) % 2**63
    return ProbedLength(Length(state["length"], step, weight.numel()), seed)


def probed_square_sum(
    product: Product, factors: tuple[Tensor | None, Tensor | None], seed: int, count: int = PROBES
) -> Tensor:
    """Return an unbiased estimate of ||S D^T H C||_F^2 from thin products.

    For z of independent signs E ||S D^T H C z||^2 = ||S D^T H C||_F^2; the mean of ``count`` draws.
    Its relative variance is at most 2 / count, for a gradient of rank one.

    Args:
        product: D and H.
        factors: s (m,) and c (n,), None for 1.
        seed: Of the draws.
        count: Number of probes.

    Returns:
        Shape (1,), float64.
    """
    s, c = factors
    errors, activations = product.errors, product.activations
    low = errors.dtype is activations.dtype is torch.bfloat16
    wide = torch.bfloat16 if low else compute_dtype(errors)
    generator = torch.Generator().manual_seed(seed)
    shape = activations.shape[1], count
    signs = torch.randint(0, 2, shape, dtype=torch.int8, generator=generator, device="cpu")
    z = signs.to(errors.device, compute_dtype(errors)).mul_(2).sub_(1)
    if c is not None:
        z *= c.to(z)[:, None]
    seen = errors.to(wide).mT @ (activations.to(wide) @ z.to(wide))
    seen = seen.to(z.dtype) if s is None else seen.to(z.dtype) * s.to(z)[:, None]
    return seen.double().square().sum().reshape(1) / count


def write_product_(
    target: Tensor,
    product: Product,
    factors: Factors,
    rule: UnitwiseRule,
    velocity: Tensor | None,
    rate: float,
    decay: float,
    length: ProbedLength | None = None,
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
        length: What the update is divided by, or None. Of a velocity it is measured, of a product
            probed.
    """
    applied: tuple[Tensor | None, Tensor | None] = (None, None) if rule.upstream else factors
    if velocity is None:
        if length is not None:
            rate *= _gain_(length, probed_square_sum(product, applied, length.seed))
        add_product_(target, product, applied, rate, decay)
        return
    # B's factors are in D already, and would be missing where the velocity is scaled again.
    precision = fused_in(product.gemm, product.errors, product.activations)
    again = rule.coupled and rule.upstream
    if precision is not None and length is None and not again:
        move, rates = scaled_gemm_.on(product.backend), (scalar(rate), scalar(decay))
        given = product.errors, product.activations, *applied, *rates, velocity
        move(target, *given, scalar(rule.momentum), rule.coupled, precision is torch.bfloat16)
        return
    add_product_(velocity, product, applied, -1.0, rule.momentum)
    left, right = factors if rule.coupled else (None, None)
    if length is not None:
        rate *= _gain_(length, move_square_sums([velocity], [left], [right]))
    apply_updates_([target], [velocity], [None], [left], [right], [rate], [decay])


def _gain_(length: ProbedLength, total: Tensor) -> float:
    # A product's rate is a plain number: an accelerator is waited for.
    return float(gains_([length.length], total))
