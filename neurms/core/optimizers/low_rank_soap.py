"""SOAP inside a tracked, switched and compensated subspace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from neurms.core.ground.errors import check_betas, check_positive_int
from neurms.core.low_rank.extension import LowRank
from neurms.core.low_rank.residuals import OptimalCompensation
from neurms.core.low_rank.subspaces import FirstBasis, TrackedSubspace
from neurms.core.optimizers.base import Params, PreconditionedOptimizer
from neurms.core.optimizers.recipe import Recipe
from neurms.core.optimizers.settings import CommonSettings
from neurms.core.structures.two_sided_eigen import TwoSidedEigen

__all__ = ["LowRankSOAP"]


class LowRankSOAP(PreconditionedOptimizer):
    """The low-rank extension of SOAP: Alice with Adam inside the subspace replaced by SOAP.

    z = U^T G goes through SOAP's two-sided eigenbasis, whose left side has only r directions; the
    part that U does not span gets Alice's optimal compensation. State for an m x n matrix, m <= n:
    2 rn + mr + 3 r^2 + 2 n^2 + 2 n + 1 numbers, without the 2 n^2 where n is above
    ``max_preconditioned_dim``.

    Args:
        params: A model (routed by module kind), parameters, or parameter groups.
        lr: Learning rate.
        rank: Directions of the subspace, at least 1; matrices with a shorter side below it use
            min(m, n).
        leading: Directions kept when the subspace is switched, in [1, rank].
        interval: Steps from one renewal of the subspace to the next.
        basis_interval: Updates from one round of SOAP's bases to the next.
        betas: b1 of the momentum and of p, b2 of SOAP's averages, b3 of the tracked G G^T.
        eps: Added to the root of the second moment.
        compensation: Weight of the compensation; 0 drops it.
        gamma: Bound on the growth of the compensation's norm from step to step.
        tracking: Keep the average of z z^T; False takes b3 = 0.
        transpose_tall: Project on the shorter side.
        first_basis: ``"gradient"`` or ``"identity"``, as in
            :class:`~neurms.core.optimizers.alice.Alice`.
        max_preconditioned_dim: A side of z longer than this keeps no basis.
        seed: Of the random directions.
        **common: :class:`~neurms.core.optimizers.settings.CommonSettings`.

    Raises:
        ValueError: A setting is out of its range.
        TypeError: An unknown setting, or a parameter that is not real floating point.

    Reference:
        The structured-Fisher paper leaves extensions of structures other than Eigen-Adam as future
        work; this one is its section 5 applied to SOAP. SOAP's first step is zero, so that the
        first update is the compensation alone. Nothing is published to compare it with.

    Example:
        >>> import torch, neurms
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)
        ... )
        >>> optimizer = neurms.LowRankSOAP(model, rank=4, leading=2)
        >>> model(torch.randn(3, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    rule = "low_rank_soap"

    def __init__(
        self,
        params: Params,
        lr: float = 3e-3,
        rank: int = 128,
        leading: int = 40,
        interval: int = 200,
        basis_interval: int = 10,
        betas: tuple[float, float, float] = (0.95, 0.95, 0.999),
        eps: float = 1e-8,
        compensation: float = 0.4,
        gamma: float = 1.01,
        tracking: bool = True,
        transpose_tall: bool = True,
        first_basis: FirstBasis = "gradient",
        max_preconditioned_dim: int = 10000,
        seed: int = 0,
        **common: Unpack[CommonSettings],
    ) -> None:
        settings = {
            "lr": lr,
            "rank": rank,
            "leading": leading,
            "interval": interval,
            "basis_interval": basis_interval,
            "betas": betas,
            "eps": eps,
            "compensation": compensation,
            "gamma": gamma,
            "tracking": tracking,
            "transpose_tall": transpose_tall,
            "first_basis": first_basis,
            "max_preconditioned_dim": max_preconditioned_dim,
            "seed": seed,
        }
        super().__init__(params, settings, common)

    @classmethod
    def recipe(cls, settings: Mapping[str, Any]) -> Recipe:
        """Return the extension of the two-sided eigenbasis."""
        check_betas("betas", settings["betas"], 3)
        check_positive_int("basis_interval", settings["basis_interval"])
        check_positive_int("seed", settings["seed"], low=0)
        b1, b2, b3 = settings["betas"]
        soap = TwoSidedEigen(
            (b1, b2),
            eps=settings["eps"],
            interval=settings["basis_interval"],
            max_preconditioned_dim=settings["max_preconditioned_dim"],
        )
        subspace = TrackedSubspace(
            settings["rank"],
            settings["interval"],
            settings["leading"],
            b3,
            settings["tracking"],
            settings["first_basis"],
        )
        residual = OptimalCompensation(settings["compensation"], b1, settings["gamma"])
        extension = LowRank(
            soap,
            subspace,
            residual if settings["compensation"] else None,
            transpose="tall" if settings["transpose_tall"] else "never",
        )
        # A null space has no basis of its own, and LAPACK's choice hangs on the last bits of the
        # Gram matrix, which differ between a batched and a single product of small matrices.
        return Recipe((extension,), batched=False)
