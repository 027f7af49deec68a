"""Fira and Fira+: GaLore plus the part of the gradient that it drops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from neurms.core.ground.errors import check_betas, check_real
from neurms.core.low_rank.extension import LowRank
from neurms.core.low_rank.residuals import ScaledResidual
from neurms.core.low_rank.subspaces import SingularSubspace
from neurms.core.optimizers.base import Params, PreconditionedOptimizer
from neurms.core.optimizers.recipe import Recipe
from neurms.core.optimizers.settings import CommonSettings
from neurms.core.structures.projected_diagonal import ProjectedDiagonal
from neurms.core.transforms.bias_correction import BiasCorrection

__all__ = ["Fira"]


class Fira(PreconditionedOptimizer):
    """GaLore plus the residual outside of its subspace, scaled as Adam scales the inside.

    Column j of the residual is multiplied by ||w_j|| / (||z_j|| + 1e-8), where z = U^T G and
    w = m / (sqrt(v) + eps), and the growth of its norm is limited by ``gamma``. With
    ``compensation`` (Fira+) the residual is rescaled to that multiple of the low-rank update's norm
    instead. State for an m x n matrix, m < n: 2 rn + mr + 1 numbers, one less for Fira+.

    Args:
        params: A model (routed by module kind), parameters, or parameter groups.
        lr: Learning rate.
        rank: Directions of the subspace, at least 1; matrices with a shorter side below it use
            min(m, n).
        interval: Steps from one singular value decomposition to the next.
        scale: Constant factor of the update from within the subspace, not of the residual.
        betas: b1 and b2 of Adam.
        eps: Added to the root of the second moment.
        gamma: Bound on the growth of the residual's norm from step to step.
        compensation: alpha_c of Fira+, or None for Fira.
        **common: :class:`~neurms.core.optimizers.settings.CommonSettings`.

    Raises:
        ValueError: A setting is out of its range.
        TypeError: An unknown setting, or a parameter that is not real floating point.

    Reference:
        Chen et al., "Fira", 2024, in the form of the authors' AdamW, which takes G - scale U z for
        the residual (a quirk for scale other than 1); Fira+ from the structured-Fisher paper, with
        G - U z. Settled here: no update for coordinates of rounding noise.

    Example:
        >>> import torch, neurms
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)
        ... )
        >>> optimizer = neurms.Fira(model, rank=4)
        >>> model(torch.randn(3, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    rule = "fira"

    def __init__(
        self,
        params: Params,
        lr: float = 0.01,
        rank: int = 128,
        interval: int = 200,
        scale: float = 0.25,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        gamma: float = 1.01,
        compensation: float | None = None,
        **common: Unpack[CommonSettings],
    ) -> None:
        settings = {
            "lr": lr,
            "rank": rank,
            "interval": interval,
            "scale": scale,
            "betas": betas,
            "eps": eps,
            "gamma": gamma,
            "compensation": compensation,
        }
        super().__init__(params, settings, common)

    @classmethod
    def recipe(cls, settings: Mapping[str, Any]) -> Recipe:
        """Return Adam in the singular subspace plus the scaled residual."""
        check_betas("betas", settings["betas"], 2)
        betas = tuple(settings["betas"])
        scale = check_real("scale", settings["scale"])
        residual = ScaledResidual(settings["gamma"], scale, settings["compensation"])
        extension = LowRank(
            ProjectedDiagonal(betas, settings["eps"]),
            SingularSubspace(settings["rank"], settings["interval"]),
            residual,
            transpose="tall or square",
            scale=scale,
        )
        return Recipe((extension, BiasCorrection(betas)), decay="after")
