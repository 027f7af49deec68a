"""How NeuRMS's scale factors reach a weight: in the optimizer's pass, or in backward's GEMM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neurms.compiled.agc import row_clip_
from neurms.compiled.gemm import bfloat16_gemm_, update_gemm_
from neurms.compiled.update import apply_updates_
from neurms.core.ground.layout import Layout
from neurms.core.ground.spans import span
from neurms.core.optimizers.work import Item
from neurms.core.unitwise.statistics import scalar
from neurms.core.unitwise.tapped import Gemm

__all__ = ["Product", "write_gemm_update_", "write_update_"]

Factors = tuple[Tensor | None, Tensor | None]


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


def write_update_(
    target: Tensor,
    item: Item,
    factors: Factors,
    state: Mapping[str, Any],
    backend: str | None = None,
) -> None:
    """Move a weight or a bias by its scaled gradient, in one pass over it.

    Args:
        target: The parameter, or the float32 copy that stands for it; overwritten.
        item: The parameter's gradient, group and route.
        factors: s (m,), and c (n,) or None.
        state: Holds the velocity under ``"momentum"`` where the group has momentum.
        backend: How the plain pass over a matrix runs; None follows ``use_backend``.
    """
    group = item.group
    s, c = factors
    if s is not None and _is_plain_bias(target, item, s):
        # One call: a bias costs no time but that of calls.
        rate = -float(group["lr"])
        if group["variant"] == "B":
            target.add_(item.gradient, alpha=rate)
        else:
            target.addcmul_(item.gradient, s, value=rate)
        return
    # B's gradient came out of backward scaled; its velocity may be scaled once more.
    applied: Factors = (None, None) if group["variant"] == "B" else (s, c)
    layout, velocity = item.route.layout, state["momentum"] if group["momentum"] else None
    if _is_plain_matrix(target, item):
        move = apply_updates_ if backend is None else apply_updates_.on(backend)
        rate, kept = _rates(group, decayed=True)
        left, right = applied
        move([target], [item.gradient], [None], [left], [right], [rate], [kept])
        return
    w, g = _blocks(layout, target), _blocks(layout, item.gradient)
    v = None if velocity is None else _blocks(layout, velocity)
    lr, decay = _rates(group, decayed=target.ndim >= 2)
    left, right = _shaped(layout, target, *applied)
    twice = _shaped(layout, target, s, c)
    coupled = group["momentum_coupling"] == "gradient+velocity"
    if group["agc"] is not None and w.ndim > 1:
        _clipped_update_(w, v, g, (left, right), twice if coupled else (None, None), group, decay)
    else:
        # B's velocity takes the gradient as it is.
        left, right = twice if coupled and v is not None else (left, right)
        scale, mu = group["variant"] != "B", group["momentum"]
        rates: Any = [lr], [decay], mu, 1.0, scale, coupled
        apply_updates_([w], [g], [v], [left], [right], *rates)
    _write_back(layout, target, w)
    if velocity is not None and v is not None:
        _write_back(layout, velocity, v)


def write_gemm_update_(
    target: Tensor,
    product: Product,
    factors: tuple[Tensor, Tensor | None],
    state: Mapping[str, Any],
    group: Mapping[str, Any],
) -> None:
    """Write W <- decay W - lr S D^T H C by one GEMM, or V <- mu V + S D^T H C and W from V.

    Args:
        target: W, shape (m, n); overwritten.
        product: D and H.
        factors: s (m,), and c (n,) or None.
        state: Holds the velocity under ``"momentum"`` where the group has momentum.
        group: Settings.
    """
    applied: Factors = (None, None) if group["variant"] == "B" else factors
    rate, momentum = float(group["lr"]), group["momentum"]
    decay = 1.0 - rate * group["weight_decay"]
    again = group["momentum_coupling"] == "gradient+velocity"
    if not momentum:
        _write_product_(target, product, applied, rate, decay)
        return
    velocity = state["momentum"]
    # B's factors are in D already, and would be missing where the velocity is scaled again.
    if product.in_bfloat16 and not (again and group["variant"] == "B"):
        move, rates = bfloat16_gemm_.on(product.backend), (scalar(rate), scalar(decay))
        signals = product.errors, product.activations
        move(target, *signals, *applied, *rates, velocity, scalar(momentum), again)
        return
    _write_product_(velocity, product, applied, -1.0, momentum)
    scales: Factors = factors if again else (None, None)
    left, right = scales
    apply_updates_([target], [velocity], [None], [left], [right], [rate], [decay])


def _write_product_(
    target: Tensor, product: Product, factors: Factors, rate: float, decay: float
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


def _is_plain_bias(target: Tensor, item: Item, s: Tensor) -> bool:
    """Return whether a bias moves by -lr S G and nothing else."""
    return (
        target.ndim == 1
        and not item.group["momentum"]
        and item.gradient.dtype == s.dtype == target.dtype
        and item.gradient.shape == target.shape == s.shape
    )


def _is_plain_matrix(target: Tensor, item: Item) -> bool:
    """Return whether a weight of units by features moves by W <- decay W - lr S G C."""
    group = item.group
    by_units = target.ndim == 2 and item.route.layout.unit_axes == (0,)
    return by_units and not group["momentum"] and group["agc"] is None


def _clipped_update_(
    w: Tensor,
    v: Tensor | None,
    g: Tensor,
    factors: Factors,
    velocity_factors: Factors,
    group: Mapping[str, Any],
    decay: float,
) -> None:
    """As in :func:`write_update_`, with the update formed so that its rows can be clipped."""
    update = _times(g.to(w.dtype), *factors)
    if v is not None:
        update = _times(v.mul_(group["momentum"]).add_(update), *velocity_factors)
    clipped = row_clip_(update.clone(), w, group["agc"])
    if decay != 1.0:
        w.mul_(decay)
    w.add_(clipped, alpha=-float(group["lr"]))


def _times(x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    if left is not None:
        x = x * (left if left.ndim == x.ndim else left[:, None])
    return x if right is None else x * right


def _blocks(layout: Layout, tensor: Tensor) -> Tensor:
    """Return a weight as a matrix where it is one, else as (groups, units, features, taps).

    A view, or a copy where the strides of the kernel positions allow none.
    """
    if tensor.ndim < 2 or (tensor.ndim == 2 and layout.unit_axes == (0,)):
        return tensor
    try:
        return layout.blocks(tensor)
    except RuntimeError:
        return layout.blocks(tensor.contiguous())


def _write_back(layout: Layout, tensor: Tensor, blocks: Tensor) -> None:
    """Bring ``tensor`` up to date if its ``blocks``, which were written, are a copy."""
    if blocks.data_ptr() != tensor.data_ptr():
        own = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        layout.blocks(own).copy_(blocks)
        tensor.copy_(own)


def _shaped(layout: Layout, tensor: Tensor, s: Tensor | None, c: Tensor | None) -> Factors:
    if tensor.ndim < 2 or (tensor.ndim == 2 and layout.unit_axes == (0,)):
        return s, c
    return (
        None if s is None else layout.unit_factors(s),
        None if c is None else layout.feature_factors(c),
    )


def _rates(group: Mapping[str, Any], *, decayed: bool) -> tuple[float, float]:
    """Return lr and 1 - lr wd."""
    lr = float(group["lr"])
    return lr, 1.0 - lr * group["weight_decay"] if decayed else 1.0
