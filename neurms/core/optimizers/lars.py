"""LARS: layer-wise adaptive rates for SGD with momentum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from neurms.core.optimizers.base import Params
from neurms.core.optimizers.in_backward import UpdateMode
from neurms.core.optimizers.momentum_first import MomentumFirst
from neurms.core.optimizers.momentum_layers import Entry
from neurms.core.optimizers.recipe import Recipe
from neurms.core.optimizers.settings import CommonSettings
from neurms.core.optimizers.view import View
from neurms.core.taps.products import Product, square_norm
from neurms.core.transforms.momentum import Momentum
from neurms.core.transforms.safeguards import CoupledDecay, TrustRatio, frobenius

__all__ = ["LARS"]


class LARS(MomentumFirst):
    """SGD with momentum and a trust ratio for each matrix.

    U = G + wd W ; U <- tau ||W|| / ||U|| U (U itself where a norm is 0) ; M <- mu M + U ;
    W <- W - lr M, or, with ``nesterov``, W - lr (U + mu M). State: mn numbers, none for mu = 0.

    Args:
        params: A model (routed by module kind), parameters, or parameter groups.
        lr: Learning rate.
        momentum: mu.
        trust_coefficient: tau.
        nesterov: Look ahead.
        update: ``"step"``, or ``"backward"``, without ``nesterov``: the backward of each
            ``nn.Linear`` under the rule writes U into M, and no gradient of its weight is formed,
            which saves that memory. ||G + wd W|| is made of a few rows of G at a time, by one more
            product. It needs all of G: a batch in parts is refused, as is what acts on gradients
            (clipping, a GradScaler, several ranks).
        **common: :class:`~neurms.core.optimizers.settings.CommonSettings`. ``weight_decay`` is
            coupled: it enters U.

    Raises:
        ValueError: A setting is out of its range, or ``update="backward"`` meets ``nesterov`` or
            no momentum.
        TypeError: An unknown setting, a parameter that is not real floating point, or parameters
            without their model for ``update="backward"``.
        UnsupportedTrainingError: Several ranks train, and ``update="backward"``.

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
    one_backward = True

    def __init__(
        self,
        params: Params,
        lr: float = 0.1,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
        nesterov: bool = False,
        update: UpdateMode = "step",
        **common: Unpack[CommonSettings],
    ) -> None:
        settings = {
            "lr": lr,
            "momentum": momentum,
            "trust_coefficient": trust_coefficient,
            "nesterov": nesterov,
        }
        super().__init__(params, settings, common, update)

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

    def entry(self, view: View, recipe: Recipe, product: Product) -> Entry:
        """Return what the gradient, and the decay with it, enters the velocity with."""
        decay, sign = float(view.group["weight_decay"]), -1.0 if view.group["maximize"] else 1.0
        trust = next(t for t in recipe.transforms if isinstance(t, TrustRatio))
        weight = view.weight
        length = square_norm(product, weight, decay, sign).sqrt().to(weight.dtype)
        ratio = float(trust.ratio(frobenius(weight), length))
        return sign * ratio, ratio * decay
