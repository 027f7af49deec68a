"""APOLLO and APOLLO-mini: the raw gradient, scaled by what Adam does to a projection of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Unpack

from neurms.core.ground.errors import check_betas, check_choice, check_positive_int, check_real
from neurms.core.low_rank.projected_scaling import ProjectedScaling, ScaleType
from neurms.core.low_rank.subspaces import RandomSubspace, SingularSubspace
from neurms.core.optimizers.base import Params, PreconditionedOptimizer
from neurms.core.optimizers.recipe import Recipe
from neurms.core.optimizers.settings import CommonSettings
from neurms.core.structures.projected_diagonal import ProjectedDiagonal
from neurms.core.transforms.bias_correction import BiasCorrection
from neurms.core.transforms.safeguards import NormGrowthLimiter

__all__ = ["APOLLO"]


class APOLLO(PreconditionedOptimizer):
    """Channel-wise (or tensor-wise) scaling of the raw gradient, learned from a projected Adam.

    With z = P^T G and w = m / (sqrt(v) + eps) of Adam on z, column j of G is multiplied by
    ||w_j|| / (||z_j|| + 1e-8), the growth of the norm is limited by ``gamma``, and W moves by
    -lr sqrt(scale) times that, with Adam's correction sqrt(1 - b2^t) / (1 - b1^t). Channels run
    over the longer side of the matrix. State for an m x n matrix, m < n: 2 rn + 1 numbers with a
    random projection, which is drawn again in every step instead of kept, mr more with ``"svd"``.

    APOLLO-mini is ``rank=1, scale_type="tensor", scale=128.0``.

    Args:
        params: A model (routed by module kind), parameters, or parameter groups.
        lr: Learning rate.
        rank: Directions of the subspace, at least 1; matrices with a shorter side below it use
            min(m, n).
        interval: Steps from one projection to the next.
        scale: The update is multiplied by its square root.
        scale_type: ``"channel"`` or ``"tensor"``.
        projection: ``"random"`` (normal numbers of variance 1/rank) or ``"svd"``.
        betas: b1 and b2 of Adam.
        eps: Added to the root of the second moment.
        gamma: Bound on the growth of the scaled gradient's norm from step to step.
        seed: Of the random projections.
        **common: :class:`~neurms.core.optimizers.settings.CommonSettings`.

    Raises:
        ValueError: A setting is out of its range.
        TypeError: An unknown setting, or a parameter that is not real floating point.

    Reference:
        Zhu et al., "APOLLO: SGD-like Memory, AdamW-level Performance", 2024, in the form of the
        authors' AdamW; their random numbers differ from ours.

    Example:
        >>> import torch, neurms
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)
        ... )
        >>> optimizer = neurms.APOLLO(model, rank=4)
        >>> model(torch.randn(3, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    rule = "apollo"

    def __init__(
        self,
        params: Params,
        lr: float = 0.01,
        rank: int = 128,
        interval: int = 200,
        scale: float = 1.0,
        scale_type: ScaleType = "channel",
        projection: Literal["random", "svd"] = "random",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        gamma: float = 1.01,
        seed: int = 0,
        **common: Unpack[CommonSettings],
    ) -> None:
        settings = {
            "lr": lr,
            "rank": rank,
            "interval": interval,
            "scale": scale,
            "scale_type": scale_type,
            "projection": projection,
            "betas": betas,
            "eps": eps,
            "gamma": gamma,
            "seed": seed,
        }
        super().__init__(params, settings, common)

    @classmethod
    def recipe(cls, settings: Mapping[str, Any]) -> Recipe:
        """Return the scaled raw gradient, limited, then corrected for Adam's bias."""
        check_betas("betas", settings["betas"], 2)
        check_choice("projection", settings["projection"], ("random", "svd"))
        check_positive_int("seed", settings["seed"], low=0)
        betas = tuple(settings["betas"])
        kind = RandomSubspace if settings["projection"] == "random" else SingularSubspace
        structure = ProjectedScaling(
            ProjectedDiagonal(betas, settings["eps"]),
            kind(settings["rank"], settings["interval"]),
            settings["scale_type"],
        )
        transforms = (structure, NormGrowthLimiter(settings["gamma"]), BiasCorrection(betas))
        return Recipe(
            transforms, scale=check_real("scale", settings["scale"]) ** 0.5, decay="after"
        )
