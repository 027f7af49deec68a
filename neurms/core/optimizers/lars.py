"""LARS: layer-wise adaptive rates for SGD with momentum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from neurms.core.optimizers.base import Params, PreconditionedOptimizer
from neurms.core.optimizers.recipe import Recipe
from neurms.core.optimizers.settings import CommonSettings
from neurms.core.transforms.momentum import Momentum
from neurms.core.transforms.safeguards import CoupledDecay, TrustRatio

__all__ = ["LARS"]


class LARS(PreconditionedOptimizer):
    """SGD with momentum and a trust ratio for each matrix.

    U = G + wd W ; U <- tau ||W|| / ||U|| U (U itself where a norm is 0) ; M <- mu M + U ;
    W <- W - lr M, or, with ``nesterov``, W - lr (U + mu M). State: mn numbers, none for mu = 0.

    Args:
        params: A model (routed by module kind), parameters, or parameter groups.
        lr: Learning rate.
        momentum: mu.
        trust_coefficient: tau.
        nesterov: Look ahead.
        **common: :class:`~neurms.core.optimizers.settings.CommonSettings`. ``weight_decay`` is
            coupled: it enters U.

    Raises:
        ValueError: A setting is out of its range.
        TypeError: An unknown setting, or a parameter that is not real floating point.

    Reference:
        You, Gitman and Ginsburg, "Large Batch Training of Convolutional Networks", 2017, Algorithm
        1. Departures: lr stands outside the velocity, as in torch.optim.SGD, which is the same for
        a constant lr. With decay the ratio's denominator is ||G + wd W||, the length of what it
        scales, as in optax and timm; the paper has ||G|| + wd ||W||, which is never smaller.

    Example:
        >>> import torch, neurms
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> optimizer = neurms.LARS([weight], lr=1.0, trust_coefficient=0.1)
        >>> weight.grad = torch.tensor([[10.0, 0.0]])
        >>> optimizer.step()
        >>> weight.data
        tensor([[2.5000, 4.0000]])
    """

    rule = "lars"

    def __init__(
        self,
        params: Params,
        lr: float = 0.1,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
        nesterov: bool = False,
        **common: Unpack[CommonSettings],
    ) -> None:
        settings = {
            "lr": lr,
            "momentum": momentum,
            "trust_coefficient": trust_coefficient,
            "nesterov": nesterov,
        }
        super().__init__(params, settings, common)

    @classmethod
    def recipe(cls, settings: Mapping[str, Any]) -> Recipe:
        """Return decay, trust ratio and momentum."""
        return Recipe(
            (
                CoupledDecay(settings["weight_decay"]),
                TrustRatio(settings["trust_coefficient"]),
                Momentum(settings["momentum"], settings["nesterov"], average=False),
            ),
            decay="none",
        )
