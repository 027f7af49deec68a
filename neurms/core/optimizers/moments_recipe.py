"""The recipe of variant P in step mode: a gradient scaled by its own moments."""

from __future__ import annotations

from functools import partial

from neurms.compiled.update import apply_updates_
from neurms.core.ground.spans import span
from neurms.core.optimizers.recipe import FusedStep, Recipe
from neurms.core.structures.gradient_moments import GradientMoments

__all__ = ["moments_recipe"]


def moments_recipe(structure: GradientMoments) -> Recipe:
    """Return W <- (1 - lr wd) W - lr U for the structure's U.

    Its fused form makes four passes over memory of the matrix's size: a read of G for the sums,
    then a read of G and a read and a write of W. Momentum adds a read and a write of M.

    Example:
        >>> import torch
        >>> from neurms.core.structures.base import Context
        >>> recipe = moments_recipe(GradientMoments())
        >>> gradient = torch.tensor([[2.0, -2.0]])
        >>> recipe.update(gradient, recipe.init(gradient), Context(step=1)).round(decimals=4)
        tensor([[ 1., -1.]])
    """
    return Recipe((structure,), fused=partial(_fused_step, structure))


def _fused_step(structure: GradientMoments, call: FusedStep) -> None:
    with span("reduce"):
        sums = structure.sums(call.gradient)
        left, right = structure.scales(*sums, call.state, call.context)
    apply_updates_(
        [call.weight],
        [call.gradient],
        [call.state.get("momentum")],
        *([left], [right], [call.lr], [call.decay]),
        momentum=structure.momentum,
        fresh=1.0 - structure.momentum,
        scale_gradient=False,
        scale_velocity=True,
    )
