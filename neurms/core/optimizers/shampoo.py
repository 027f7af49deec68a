"""Shampoo: inverse fourth roots of both Kronecker factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from neurms.core.ground.errors import check_choice, check_fraction
from neurms.core.optimizers.base import Params, PreconditionedOptimizer
from neurms.core.optimizers.recipe import Recipe
from neurms.core.optimizers.settings import CommonSettings
from neurms.core.structures.adapters import Averaged, Flattened, Tiled
from neurms.core.structures.kronecker import Kronecker
from neurms.core.transforms.momentum import Momentum
from neurms.core.transforms.safeguards import Grafted, Grafting

__all__ = ["Shampoo", "accumulation_betas"]


class Shampoo(PreconditionedOptimizer):
    """Precondition both sides of the gradient by the fourth roots of its second moments.

    L <- b2 L + (1 - b2) G G^T, R <- b2 R + (1 - b2) G^T G (plain sums for b2 = 1, as in AdaGrad);
    M <- b1 M + (1 - b1) G, corrected by 1 - b1^t (M = G for b1 = 0);
    U = (L + eps I)^(-1/4) M (R + eps I)^(-1/4), grafted to another method's length, then momentum:
    V <- momentum V + U ; W <- W - lr V. Matrices are cut into tiles of at most ``block_size`` rows
    and columns, each a Shampoo of its own. State per tile: m^2 + n^2 numbers, twice that for
    ``interval`` > 1, and mn each for b1, grafting (except "sgd") and momentum where they are used.

    Args:
        params: A model (routed by module kind), parameters, or parameter groups.
        lr: Learning rate.
        betas: b1 of the gradient's average and b2 of the factors, b2 = 1 for sums.
        eps: Added to the eigenvalues of the factors.
        interval: Steps between two computations of the roots, at a cost of O(m^3 + n^3) each; 20 or
            more for layers of a thousand units.
        block_size: Largest side of a tile.
        grafting: ``None``, ``"sgd"``, ``"adam"``, ``"rmsprop"`` or ``"rmsprop_normalized"``: whose
            length a tile's update gets.
        merge_dims: Treat a matrix of at most ``block_size`` entries as one vector, preconditioned
            by the inverse square root of its mn x mn second moment: full-matrix AdaGrad, (mn)^2
            numbers of state. False keeps two factors whatever the size.
        momentum: Heavy-ball momentum of the grafted update.
        nesterov: Look ahead with it.
        stagger: Compute the roots of different matrices at different steps of the interval, chosen
            by their names, so that no step has all of that work. Distributed Shampoo computes all
            at once.
        **common: :class:`~neurms.core.optimizers.settings.CommonSettings`.

    Raises:
        ValueError: A setting is out of its range.
        TypeError: An unknown setting, or a parameter that is not real floating point.

    Reference:
        "Shampoo: Preconditioned Stochastic Tensor Optimization", Gupta et al., 2018, Algorithm 1;
        averages, tiles, merged dimensions and grafting as in "A Distributed Data-Parallel PyTorch
        Implementation of the Distributed Shampoo Optimizer", Shi et al., 2023, whose AdaGrad form
        is the default. Departure: its warm-up on the grafted method alone is left out; the roots
        are there from the first step.

    Example:
        >>> import torch, neurms
        >>> weight = torch.nn.Parameter(torch.zeros(2, 2))
        >>> optimizer = neurms.Shampoo([weight], lr=0.5, merge_dims=False)
        >>> weight.grad = torch.diag(torch.tensor([4.0, -9.0]))
        >>> optimizer.step()
        >>> weight.data.round(decimals=4)
        tensor([[-0.5000,  0.0000],
                [ 0.0000,  0.5000]])
    """

    rule = "shampoo"

    def __init__(
        self,
        params: Params,
        lr: float = 0.01,
        betas: tuple[float, float] = (0.0, 1.0),
        eps: float = 1e-6,
        interval: int = 1,
        block_size: int = 1024,
        grafting: Grafting | None = None,
        merge_dims: bool = True,
        momentum: float = 0.0,
        nesterov: bool = False,
        stagger: bool = False,
        **common: Unpack[CommonSettings],
    ) -> None:
        settings = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "interval": interval,
            "block_size": block_size,
            "grafting": grafting,
            "merge_dims": merge_dims,
            "momentum": momentum,
            "nesterov": nesterov,
            "stagger": stagger,
        }
        super().__init__(params, settings, common)

    @classmethod
    def recipe(cls, settings: Mapping[str, Any]) -> Recipe:
        """Return the tiled, grafted Kronecker structure followed by momentum."""
        b1, b2 = accumulation_betas(settings["betas"])
        stagger = settings["stagger"]
        kronecker = Kronecker(b2, settings["eps"], settings["interval"], stagger)
        structure = Averaged(kronecker, b1)
        tiled = Tiled(Grafted(structure, settings["grafting"]), settings["block_size"])
        check_choice("merge_dims", settings["merge_dims"], (True, False))
        flattened = Flattened(tiled, settings["block_size"] if settings["merge_dims"] else 0)
        momentum = Momentum(settings["momentum"], settings["nesterov"], average=False)
        # Matrices in a stack would all have the first one's turn.
        return Recipe((flattened, momentum), batched=not stagger)


def accumulation_betas(betas: Any) -> tuple[float, float]:
    """Return (b1, b2) with b1 in [0, 1) and b2 in [0, 1], where 1 stands for sums, else raise."""
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(
            f"betas={betas!r} must hold 2 numbers, the first in [0, 1), the second in [0, 1]"
        )
    return check_fraction("betas[0]", betas[0]), check_fraction("betas[1]", betas[1], closed=True)
