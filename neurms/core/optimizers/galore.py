"""GaLore: Adam on the leading singular directions of the gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from neurms.core.ground.errors import check_betas
from neurms.core.low_rank.extension import LowRank
from neurms.core.low_rank.subspaces import SingularSubspace
from neurms.core.optimizers.base import Params, PreconditionedOptimizer
from neurms.core.optimizers.recipe import Recipe
from neurms.core.optimizers.settings import CommonSettings
from neurms.core.structures.projected_diagonal import ProjectedDiagonal
from neurms.core.transforms.bias_correction import BiasCorrection

__all__ = ["GaLore"]


class GaLore(PreconditionedOptimizer):
    """Adam on a projection of the gradient on its leading singular vectors.

    With U the leading left singular vectors of G (or of G^T where m >= n), renewed every
    ``interval`` steps, and Adam's averages of z = U^T G: W moves by -lr scale U (m / (sqrt(v) +
    eps)) times Adam's correction sqrt(1 - b2^t) / (1 - b1^t). The low-rank extension without
    tracking, switching and compensation. State for an m x n matrix, m < n: 2 rn + mr numbers.

    Args:
        params: A model (routed by module kind), parameters, or parameter groups.
        lr: Learning rate.
        rank: Directions of the subspace, at least 1; matrices with a shorter side below it use
            min(m, n).
        interval: Steps from one singular value decomposition to the next.
        scale: Constant factor of the update.
        betas: b1 and b2 of Adam.
        eps: Added to the root of the second moment.
        **common: :class:`~neurms.core.optimizers.settings.CommonSettings`.

    Raises:
        ValueError: A setting is out of its range.
        TypeError: An unknown setting, or a parameter that is not real floating point.

    Reference:
        Zhao et al., "GaLore", 2024, in the form of the authors' AdamW: moments stay as they are
        when U changes, weight decay comes after the update. Settled here: no update for
        coordinates of rounding noise.

    Example:
        >>> import torch, neurms
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)
        ... )
        >>> optimizer = neurms.GaLore(model, rank=4)
        >>> model(torch.randn(3, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    rule = "galore"

    def __init__(
        self,
        params: Params,
        lr: float = 0.01,
        rank: int = 128,
        interval: int = 200,
        scale: float = 0.25,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        **common: Unpack[CommonSettings],
    ) -> None:
        settings = {
            "lr": lr,
            "rank": rank,
            "interval": interval,
            "scale": scale,
            "betas": betas,
            "eps": eps,
        }
        super().__init__(params, settings, common)

    @classmethod
    def recipe(cls, settings: Mapping[str, Any]) -> Recipe:
        """Return Adam in the singular subspace, without a residual."""
        check_betas("betas", settings["betas"], 2)
        betas = tuple(settings["betas"])
        extension = LowRank(
            ProjectedDiagonal(betas, settings["eps"]),
            SingularSubspace(settings["rank"], settings["interval"]),
            transpose="tall or square",
            scale=settings["scale"],
            correction=BiasCorrection(betas),
        )
        return Recipe((extension,), decay="after")
