"""Sketchy: Shampoo from two frequent-directions sketches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from neurms.core.optimizers.base import Params, PreconditionedOptimizer
from neurms.core.optimizers.recipe import Recipe
from neurms.core.optimizers.settings import CommonSettings
from neurms.core.optimizers.shampoo import accumulation_betas
from neurms.core.structures.adapters import Averaged
from neurms.core.structures.kronecker_sketch import KroneckerSketch
from neurms.core.transforms.momentum import Momentum
from neurms.core.transforms.safeguards import Grafted, Grafting

__all__ = ["Sketchy"]


class Sketchy(PreconditionedOptimizer):
    """Shampoo with factors kept in k directions each, the mass that escapes them added evenly.

    L ~ U diag(s) U^T + rho I from a frequent-directions sketch of the sum (b2 = 1) or average of
    G G^T, R alike from G^T G; U = (L + eps I)^(-1/4) M (R + eps I)^(-1/4) with M the average of G
    for b1 > 0, grafted to another method's length, then momentum: V <- momentum V + U ; W <- W - lr
    V. State: k (m + n + 2) + 2 numbers, and mn each for b1, grafting (except "sgd") and momentum
    where they are used.

    Args:
        params: A model (routed by module kind), parameters, or parameter groups.
        lr: Learning rate.
        rank: Directions k of either side; reduced to m or n where that is less.
        betas: b1 of the gradient's average and b2 of the factors, b2 = 1 for sums.
        eps: Added to the eigenvalues of the factors.
        interval: Only every interval-th gradient enters the sketches, at a cost of O(mn min(m, n)).
        grafting: ``None``, ``"sgd"``, ``"adam"``, ``"rmsprop"`` or ``"rmsprop_normalized"``: whose
            length the update gets.
        momentum: Heavy-ball momentum of the grafted update.
        nesterov: Look ahead with it.
        **common: :class:`~neurms.core.optimizers.settings.CommonSettings`.

    Raises:
        ValueError: A setting is out of its range.
        TypeError: An unknown setting, or a parameter that is not real floating point.

    Reference:
        "Sketchy: Memory-efficient Adaptive Regularization with Frequent Directions", Feinberg et
        al., NeurIPS 2023, Algorithm 3. Departures: the deflation of the authors' code, see
        :class:`~neurms.core.structures.kronecker_sketch.KroneckerSketch`.

    Example:
        >>> import torch, neurms
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)
        ... )
        >>> optimizer = neurms.Sketchy(model, lr=0.01, rank=2)
        >>> model(torch.randn(3, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    rule = "sketchy"

    def __init__(
        self,
        params: Params,
        lr: float = 0.01,
        rank: int = 128,
        betas: tuple[float, float] = (0.0, 0.999),
        eps: float = 1e-6,
        interval: int = 1,
        grafting: Grafting | None = None,
        momentum: float = 0.0,
        nesterov: bool = False,
        **common: Unpack[CommonSettings],
    ) -> None:
        settings = {
            "lr": lr,
            "rank": rank,
            "betas": betas,
            "eps": eps,
            "interval": interval,
            "grafting": grafting,
            "momentum": momentum,
            "nesterov": nesterov,
        }
        super().__init__(params, settings, common)

    @classmethod
    def recipe(cls, settings: Mapping[str, Any]) -> Recipe:
        """Return the grafted sketch structure followed by momentum."""
        b1, b2 = accumulation_betas(settings["betas"])
        sketch = KroneckerSketch(settings["rank"], b2, settings["eps"], settings["interval"])
        grafted = Grafted(Averaged(sketch, b1), settings["grafting"])
        momentum = Momentum(settings["momentum"], settings["nesterov"], average=False)
        return Recipe((grafted, momentum))
