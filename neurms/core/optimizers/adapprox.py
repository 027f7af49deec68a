"""Adapprox: Adam with a low-rank second moment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from neurms.core.ground.errors import check_betas, check_positive_int
from neurms.core.optimizers.base import Params, PreconditionedOptimizer
from neurms.core.optimizers.recipe import Recipe
from neurms.core.optimizers.settings import CommonSettings
from neurms.core.structures.low_rank_moment import LowRankMoment
from neurms.core.transforms.momentum import Momentum
from neurms.core.transforms.safeguards import RootMeanSquareClip

__all__ = ["Adapprox"]


class Adapprox(PreconditionedOptimizer):
    """Adam whose second moment is kept as a rank-k product Q U^T, with clipped updates.

    V = b2 max(Q U^T, 0) + (1 - b2) G.^2 ; Q U^T <- the rank-k fit of V by randomized subspace
    iteration ; U = G / (sqrt(V) + eps) ; U <- U / max(1, RMS(U) / clip) ; M <- b1 M + (1 - b1) U ;
    W <- W - lr M. State: k (m + n) numbers, and mn for b1 > 0.

    Args:
        params: A model (routed by module kind), parameters, or parameter groups.
        lr: Learning rate.
        rank: k; reduced to min(m, n) for matrices with a shorter side.
        betas: b1 of the clipped updates' average and b2 of the second moment.
        eps: Added to sqrt(V).
        clip: Bound on the root mean square of an update.
        iterations: Rounds of subspace iteration.
        oversampling: Random columns drawn beyond k.
        seed: Of the random draws, which also depend on the parameter's name and the step.
        **common: :class:`~neurms.core.optimizers.settings.CommonSettings`.

    Raises:
        ValueError: A setting is out of its range.
        TypeError: An unknown setting, or a parameter that is not real floating point.

    Reference:
        "Adapprox: Adaptive Approximation in Adam Optimization via Randomized Low-Rank Matrices",
        Zhao et al., 2024, Algorithm 3. Departures: a fixed rank instead of one adapted during
        training, and no cosine-similarity guidance; see
        :class:`~neurms.core.structures.low_rank_moment.LowRankMoment`.

    Example:
        >>> import torch, neurms
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)
        ... )
        >>> optimizer = neurms.Adapprox(model, lr=1e-3, rank=2)
        >>> model(torch.randn(3, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    rule = "adapprox"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        rank: int = 32,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        clip: float = 1.0,
        iterations: int = 5,
        oversampling: int = 5,
        seed: int = 0,
        **common: Unpack[CommonSettings],
    ) -> None:
        settings = {
            "lr": lr,
            "rank": rank,
            "betas": betas,
            "eps": eps,
            "clip": clip,
            "iterations": iterations,
            "oversampling": oversampling,
            "seed": seed,
        }
        super().__init__(params, settings, common)

    @classmethod
    def recipe(cls, settings: Mapping[str, Any]) -> Recipe:
        """Return the low-rank second moment, the clip and the average of the updates."""
        check_betas("betas", settings["betas"], 2)
        check_positive_int("seed", settings["seed"], low=0)
        b1, b2 = settings["betas"]
        moment = LowRankMoment(
            settings["rank"], b2, settings["eps"], settings["iterations"], settings["oversampling"]
        )
        return Recipe((moment, RootMeanSquareClip(settings["clip"]), Momentum(b1)))
