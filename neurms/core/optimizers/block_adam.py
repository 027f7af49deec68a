"""BlockAdam: Adam with full blocks of neighbouring features in its second moment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from neurms.core.ground.errors import check_betas
from neurms.core.optimizers.base import Params, PreconditionedOptimizer
from neurms.core.optimizers.recipe import Recipe
from neurms.core.optimizers.settings import CommonSettings
from neurms.core.structures.adapters import Averaged
from neurms.core.structures.block_diagonal import BlockDiagonal

__all__ = ["BlockAdam"]


class BlockAdam(PreconditionedOptimizer):
    """Adam whose second moment keeps the covariances of b neighbouring features within each unit.

    M <- b1 M + (1 - b1) G ; V <- b2 V + (1 - b2) g g^T for every block g of b features of a unit;
    the block of the update is ((V / (1 - b2^t))^(1/2) + eps I)^(-1) m / (1 - b1^t). With b = 1 this
    is Adam. State: mn (b + 1) numbers, mn (2b + 1) for ``interval`` > 1 and b > 1.

    Args:
        params: A model (routed by module kind), parameters, or parameter groups.
        lr: Learning rate.
        betas: b1 of the gradient's average and b2 of the blocks.
        eps: Added to the square roots of the eigenvalues.
        block_size: Largest b; each matrix takes the largest divisor of its n up to it, so that a
            prime n gives Adam.
        interval: Steps between two computations of the roots: mn/b eigenproblems of size b. Blocks
            that meet a gradient which their root has not seen the like of do not wait.
        **common: :class:`~neurms.core.optimizers.settings.CommonSettings`.

    Raises:
        ValueError: A setting is out of its range.
        TypeError: An unknown setting, or a parameter that is not real floating point.

    Reference:
        "Block Low-Rank Preconditioner with Shared Basis for Stochastic Optimization", Yen et al.,
        NeurIPS 2023, which compares with it.

    Example:
        >>> import torch, neurms
        >>> weight = torch.nn.Parameter(torch.zeros(1, 2))
        >>> optimizer = neurms.BlockAdam([weight], lr=0.1, block_size=2)
        >>> weight.grad = torch.tensor([[3.0, 4.0]])
        >>> optimizer.step()  # m = g and V = g g^T: the update is g / |g|
        >>> weight.data
        tensor([[-0.0600, -0.0800]])
    """

    rule = "block_adam"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        block_size: int = 8,
        interval: int = 10,
        **common: Unpack[CommonSettings],
    ) -> None:
        settings = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "block_size": block_size,
            "interval": interval,
        }
        super().__init__(params, settings, common)

    @classmethod
    def recipe(cls, settings: Mapping[str, Any]) -> Recipe:
        """Return the block-diagonal structure on the averaged gradient."""
        check_betas("betas", settings["betas"], 2)
        b1, b2 = settings["betas"]
        blocks = BlockDiagonal(b2, settings["eps"], settings["block_size"], settings["interval"])
        return Recipe((Averaged(blocks, b1),))
