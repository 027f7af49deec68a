"""Nora: RMNP without the part of a row that only stretches the unit's weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from neurms.core.optimizers.base import Params
from neurms.core.optimizers.in_backward import UpdateMode
from neurms.core.optimizers.momentum_first import MomentumFirst
from neurms.core.optimizers.recipe import Recipe
from neurms.core.optimizers.settings import CommonSettings
from neurms.core.structures.one_sided_diagonal import RowNormalized, WithoutRadialPart
from neurms.core.transforms.momentum import Momentum
from neurms.core.transforms.shape_scale import ShapeScale

__all__ = ["Nora"]


class Nora(MomentumFirst):
    """RMNP with each row's component along the unit's own weights removed before normalising.

    M <- mu M + (1 - mu) G ; R = (1 - mu) G + mu M (``nesterov``) or M ;
    R_i <- R_i - (R_i . W_i / ||W_i||^2) W_i ; then as :class:`~neurms.core.optimizers.rmnp.RMNP`.
    State: mn numbers, none for mu = 0.

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
        Nora, with the look-ahead, the factor of the shape and the order of its authors' code: the
        averaged gradient is projected, then normalised. Settled: a unit whose weights are all zero
        keeps its whole row. A matrix of one feature is all radial, and never moves.

    Example:
        >>> import torch, neurms
        >>> weight = torch.nn.Parameter(torch.tensor([[2.0, 0.0]]))
        >>> optimizer = neurms.Nora([weight], lr=0.1)
        >>> weight.grad = torch.tensor([[3.0, 4.0]])
        >>> optimizer.step()
        >>> weight.data
        tensor([[ 2.0000, -0.1000]])
    """

    rule = "nora"

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
        """Return averaging, projection, row normalisation and the factor of the shape."""
        return Recipe(
            (
                Momentum(settings["momentum"], settings["nesterov"]),
                WithoutRadialPart(),
                RowNormalized(),
                ShapeScale("original" if settings["shape_scale"] else None),
            )
        )
