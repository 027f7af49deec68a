"""S G C written over a gradient, whatever the layout of its weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from neurms.compiled.agc import row_clip_
from neurms.compiled.update import scale_gradients_
from neurms.core.ground.layout import Layout
from neurms.core.ground.shards import is_sharded, local, row_shard

__all__ = ["precondition_gradient_"]

Factors = tuple[Tensor | None, Tensor | None]


def precondition_gradient_(
    parameter: Tensor,
    layout: Layout,
    factors: Factors,
    velocity: Tensor | None,
    settings: Mapping[str, Any],
) -> None:
    """Overwrite a gradient by S G C, or by the velocity that S G C enters, row-clipped with agc.

    Args:
        parameter: A weight or a bias (m,) with a gradient.
        layout: The parameter's units and features.
        factors: s (m,), and c (n,) or None.
        velocity: The parameter's velocity, advanced in place, or None without momentum.
        settings: NeuRMS's ``variant``, ``momentum``, ``momentum_coupling`` and ``agc``.
    """
    gradient = parameter.grad
    assert gradient is not None
    if is_sharded(parameter):
        shard = row_shard(parameter, layout)
        assert shard is not None, "layers that are cut otherwise are refused when they are attached"
        if not shard.rows:
            return
        layout, s, c = shard.narrowed(layout, *factors)
        factors = (s, c)
        parameter, gradient = local(parameter), local(gradient)
        velocity = None if velocity is None else local(velocity)
    update = gradient if velocity is None else gradient.to(velocity.dtype)
    # B's gradient came out of backward scaled; its velocity may be scaled once more.
    if settings["variant"] != "B":
        update = _scaled_(update, layout, factors)
    if velocity is not None:
        update = velocity.mul_(settings["momentum"]).add_(update)
        if settings["momentum_coupling"] == "gradient+velocity":
            update = _scaled_(update.clone(), layout, factors)
    if settings["agc"] is not None and parameter.ndim >= 2:
        rows = layout.matrix(update).clone()
        row_clip_(rows, layout.matrix(parameter.detach().to(rows.dtype)), settings["agc"])
        update = layout.from_matrix(rows)
    if update is not gradient:
        gradient.copy_(update)


def _scaled_(tensor: Tensor, layout: Layout, factors: Factors) -> Tensor:
    """Return ``tensor`` scaled by s and c: itself, in place, where its strides allow."""
    s, c = factors
    if tensor.ndim < 2 or (tensor.ndim == 2 and layout.unit_axes == (0,)):
        scale_gradients_([tensor], [s], [c])
        return tensor
    try:
        blocks = layout.blocks(tensor)
    except RuntimeError:
        tensor = tensor.contiguous()
        blocks = layout.blocks(tensor)
    scale_gradients_(
        [blocks],
        [None if s is None else layout.unit_factors(s)],
        [None if c is None else layout.feature_factors(c)],
    )
    return tensor
