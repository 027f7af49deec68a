"""LAMB: layer-wise adaptive rates for Adam."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from neurms.core.optimizers.base import Params, PreconditionedOptimizer
from neurms.core.optimizers.recipe import Recipe
from neurms.core.optimizers.settings import CommonSettings
from neurms.core.structures.diagonal import Diagonal
from neurms.core.transforms.safeguards import CoupledDecay, TrustRatio

__all__ = ["LAMB"]


class LAMB(PreconditionedOptimizer):
    """Adam with a trust ratio for each matrix.

    A = Adam's update of G ; U = A + wd W ; W <- W - lr ||W|| / ||U|| U (W - lr U where a norm is
    0). State: 2 mn numbers.

    Args:
        params: A model (routed by module kind), parameters, or parameter groups.
        lr: Learning rate.
        betas: Decay of the averages of G and G.^2.
        eps: Added to the root of the second.
        **common: :class:`~neurms.core.optimizers.settings.CommonSettings`. ``weight_decay`` enters
            U, under the trust ratio.

    Raises:
        ValueError: A setting is out of its range.
        TypeError: An unknown setting, or a parameter that is not real floating point.

    Reference:
        You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", 2020,
        Algorithm 2, with phi the identity and Adam's bias correction.

    Example:
        >>> import torch, neurms
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> optimizer = neurms.LAMB([weight], lr=0.1)
        >>> weight.grad = torch.tensor([[10.0, 0.0]])
        >>> optimizer.step()
        >>> weight.data
        tensor([[2.5000, 4.0000]])
    """

    rule = "lamb"

    def __init__(
        self,
        params: Params,
        lr: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        **common: Unpack[CommonSettings],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps}, common)

    @classmethod
    def recipe(cls, settings: Mapping[str, Any]) -> Recipe:
        """Return Adam's diagonal, decay and trust ratio."""
        adam = Diagonal(settings["betas"], settings["eps"])
        decay = CoupledDecay(settings["weight_decay"])
        return Recipe((adam, decay, TrustRatio()), decay="none")
