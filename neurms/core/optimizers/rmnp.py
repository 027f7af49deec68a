"""RMNP: row-momentum normalised preconditioning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Unpack

from neurms.compiled.row_update import row_normalized_moves_, row_normalized_updates_
from neurms.core.optimizers.base import Params
from neurms.core.optimizers.in_backward import UpdateMode
from neurms.core.optimizers.momentum_first import MomentumFirst
from neurms.core.optimizers.recipe import FusedStep, Recipe
from neurms.core.optimizers.settings import CommonSettings
from neurms.core.structures.one_sided_diagonal import FLOOR, RowNormalized
from neurms.core.transforms.momentum import Momentum
from neurms.core.transforms.shape_scale import ShapeScale

__all__ = ["RMNP"]


class RMNP(MomentumFirst):
    """Row-momentum normalised preconditioning: every unit's averaged gradient has norm 1.

    M <- mu M + (1 - mu) G ; R = (1 - mu) G + mu M (``nesterov``) or M ; W moves by
    -lr sqrt(max(1, m/n)) R_i / max(||R_i||, 1e-12) in row i. State: mn numbers, none for mu = 0.

    Args:
        params: A model (routed by module kind), parameters, or parameter groups.
        lr: Learning rate.
        momentum: mu.
        nesterov: Look ahead.
        shape_scale: Multiply by sqrt(max(1, m/n)).
        update: ``"step"``, or ``"backward"``, without ``nesterov``: the backward of each
            ``nn.Linear`` under the rule adds (1 - mu) D^T H to M, and no gradient of its weight is
            formed, which saves that memory. The batch may come in parts. What acts on gradients
            (clipping, a GradScaler, several ranks) is refused; see the guide.
        **common: :class:`~neurms.core.optimizers.settings.CommonSettings`.

    Raises:
        ValueError: A setting is out of its range, or ``update="backward"`` meets ``nesterov`` or
            no momentum.
        TypeError: An unknown setting, a parameter that is not real floating point, or parameters
            without their model for ``update="backward"``.
        UnsupportedTrainingError: Several ranks train, and ``update="backward"``.

    Reference:
        RMNP, arXiv 2603.20527, Algorithm 1. The paper's text has neither ``nesterov`` nor
        ``shape_scale``; the authors' code has both, and so have the defaults here. Settled: without
        ``nesterov`` M is normalised, as the paper says; the authors' package then normalises G and
        forgets its momentum. Tall matrices are not transposed; more than two axes are flattened to
        (units, features).

    Example:
        >>> import torch, neurms
        >>> weight = torch.nn.Parameter(torch.zeros(1, 2))
        >>> optimizer = neurms.RMNP([weight], lr=0.1)
        >>> weight.grad = torch.tensor([[3.0, 4.0]])
        >>> optimizer.step()
        >>> weight.data
        tensor([[-0.0600, -0.0800]])
    """

    rule = "rmnp"

    def __init__(
        self,
        params: Params,
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        shape_scale: bool = True,
        update: UpdateMode = "step",
        **common: Unpack[CommonSettings],
    ) -> None:
        settings = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "shape_scale": shape_scale,
        }
        super().__init__(params, settings, common, update)

    @classmethod
    def recipe(cls, settings: Mapping[str, Any]) -> Recipe:
        """Return averaging, row normalisation and the factor of the shape."""
        momentum = Momentum(settings["momentum"], settings["nesterov"])
        shape = ShapeScale("original" if settings["shape_scale"] else None)
        transforms = (momentum, RowNormalized(), shape)
        if not momentum.momentum:
            return Recipe(transforms)
        fused = partial(_fused_steps, momentum, shape)
        return Recipe(transforms, fused=fused, fused_tail=partial(_fused_tails, shape))


def _fused_steps(momentum: Momentum, shape: ShapeScale, calls: Sequence[FusedStep]) -> None:
    """Take RMNP's step in one walk over the rows of W, M and G of all matrices."""
    for call in calls:
        velocity = call.state["momentum"]
        stored = velocity.is_contiguous() and not call.weight.is_contiguous()
        if stored and call.context.shard is None:
            # Stored by columns like W and G from here on, also after a checkpoint was loaded.
            velocity.set_(velocity.mT.contiguous().mT)  # type: ignore[call-overload]
    row_normalized_updates_(
        [call.weight for call in calls],
        [call.state["momentum"] for call in calls],
        [call.gradient for call in calls],
        _rates(shape, calls),
        [call.decay for call in calls],
        momentum.momentum,
        momentum.nesterov,
        FLOOR,
    )


def _fused_tails(shape: ShapeScale, calls: Sequence[FusedStep]) -> None:
    """Take RMNP's step of matrices whose momentum, the gradient here, is up to date."""
    row_normalized_moves_(
        [call.weight for call in calls],
        [call.gradient for call in calls],
        _rates(shape, calls),
        [call.decay for call in calls],
        FLOOR,
    )


def _rates(shape: ShapeScale, calls: Sequence[FusedStep]) -> list[float]:
    return [
        call.lr * shape.factor(call.context.units(call.weight), call.weight.shape[-1])
        for call in calls
    ]
