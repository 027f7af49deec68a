"""Alice and Alice-0: Eigen-Adam in a tracked, switched and compensated subspace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, Unpack, get_args

from neurms.core.ground.errors import check_betas, check_choice, check_positive_int, check_real
from neurms.core.low_rank.extension import LowRank
from neurms.core.low_rank.residuals import OptimalCompensation, Residual, ScaledResidual
from neurms.core.low_rank.subspaces import FirstBasis, Switching, TrackedSubspace
from neurms.core.optimizers.base import Params, PreconditionedOptimizer
from neurms.core.optimizers.recipe import Recipe
from neurms.core.optimizers.settings import CommonSettings
from neurms.core.structures.projected_diagonal import ProjectedDiagonal

__all__ = ["Alice"]

ResidualKind = Literal["optimal", "fira", "fira+"]


class Alice(PreconditionedOptimizer):
    """The low-rank extension of Eigen-Adam: tracking, switching, compensation.

    With U of r orthonormal columns and z = U^T G: m <- b1 m + (1 - b1) z ; v <- b2 v + (1 - b2)
    z.^2 ; W <- W - lr alpha (U (m / sqrt(v)) + compensation C), where C = sqrt(m - r) (G - U z) /
    sqrt(p) is the optimal diagonal scaling of what U does not span, its norm's growth limited by
    ``gamma``. Every ``interval`` steps U takes one subspace iteration on b3 U Qr U^T + (1 - b3) G
    G^T, keeps its ``leading`` first directions and draws the others at random; Qr <- b3 Qr + (1 -
    b3) z z^T in every step. State for an m x n matrix, m <= n: 2 rn + mr + r^2 + n + 1 numbers.
    Alice-0 (``tracking=False``) keeps no Qr and takes b3 = 0: r^2 numbers less.

    Args:
        params: A model (routed by module kind), parameters, or parameter groups.
        lr: Learning rate.
        rank: Directions of the subspace, at least 1; matrices with a shorter side below it use
            min(m, n).
        leading: Directions kept when the subspace is switched, in [1, rank]; cut down to the
            directions that a matrix has.
        interval: Steps from one renewal of the subspace to the next.
        betas: b1 of the momentum and of p, b2 of the second moment, b3 of the tracked G G^T.
        alpha: Constant factor of the update (the paper: .3, and .25 for its 1.3B model).
        compensation: alpha_c, weight of C (the paper: .4, and .2 for 1.3B); 0 drops it and p.
        gamma: Bound on the growth of C's norm from step to step.
        tracking: Keep Qr; False is Alice-0, whatever betas[2] is.
        transpose_tall: Project on the side of the features where a matrix has more units than
            features, so that U is taken on the shorter side.
        first_basis: ``"gradient"`` starts from the eigenvectors of the first G G^T, ``"identity"``
            from the first r axes, which is what the paper's U_0 = 0 amounts to; the floor of p is
            1e-9 then.
        switching: How the other directions are drawn: ``"complement"`` of those kept, from the
            ``"full_basis"``, as ``"gaussian_mix"`` beside those kept, or ``"gaussian"`` all of
            them; see :class:`~neurms.core.low_rank.subspaces.TrackedSubspace`. The first is the
            method, the others are the paper's ablation.
        residual: What becomes of G - U z: ``"optimal"`` is C; ``"fira"`` scales its columns as z's
            were, at weight 1 and with its growth limited; ``"fira+"`` gives that ``compensation``
            times the norm of the update within. ``compensation=0`` drops it whichever it is.
        seed: Of the random directions; with a parameter's name and step it determines them.
        rotate_moments: Carry m, v and Qr over to a new U; False is the paper. None is True for
            ``first_basis="gradient"`` with an orthonormal basis, and False for ``"identity"``,
            which is the paper to the letter. Moments that stay as they are meet the signs that
            LAPACK gives the new vectors: float32 and float64 were 16 to 29 % apart after 60 steps
            (six seeds, 64 x 96, a renewal every 10), rotated at most 9e-6. On a
            small LLaMA of 300 steps the rotated ones had the lower loss in each of 12 pairs of
            runs, by .005 to .025 nats.
        **common: :class:`~neurms.core.optimizers.settings.CommonSettings`.

    Raises:
        ValueError: A setting is out of its range.
        TypeError: An unknown setting, or a parameter that is not real floating point.

    Reference:
        "Towards Efficient Optimizer Design for LLM via Structured Fisher Approximation with a
        Low-Rank Extension", Algorithms 2 to 4, Theorem 5.1. Settled here: the first basis is the
        gradient's; no compensation for a column whose p is rounding (1e-9 of its energy in
        float32), and no update for coordinates of rounding noise, because both would blow rounding
        errors up to full updates; moments follow the basis (``rotate_moments``); draws are repeated
        exactly by a resumed run.

    Example:
        >>> import torch, neurms
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)
        ... )
        >>> optimizer = neurms.Alice(model, rank=4, leading=2)
        >>> model(torch.randn(3, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    rule = "alice"

    def __init__(
        self,
        params: Params,
        lr: float = 0.02,
        rank: int = 128,
        leading: int = 40,
        interval: int = 200,
        betas: tuple[float, float, float] = (0.9, 0.9, 0.999),
        alpha: float = 0.3,
        compensation: float = 0.4,
        gamma: float = 1.01,
        tracking: bool = True,
        transpose_tall: bool = True,
        first_basis: FirstBasis = "gradient",
        switching: Switching = "complement",
        residual: ResidualKind = "optimal",
        seed: int = 0,
        rotate_moments: bool | None = None,
        **common: Unpack[CommonSettings],
    ) -> None:
        settings = {
            "lr": lr,
            "rank": rank,
            "leading": leading,
            "interval": interval,
            "betas": betas,
            "alpha": alpha,
            "compensation": compensation,
            "gamma": gamma,
            "tracking": tracking,
            "transpose_tall": transpose_tall,
            "first_basis": first_basis,
            "switching": switching,
            "residual": residual,
            "seed": seed,
            "rotate_moments": rotate_moments,
        }
        super().__init__(params, settings, common)

    @classmethod
    def recipe(cls, settings: Mapping[str, Any]) -> Recipe:
        """Return a diagonal structure's extension: tracking, switching, compensation."""
        check_betas("betas", settings["betas"], 3)
        check_real("alpha", settings["alpha"])
        check_positive_int("seed", settings["seed"], low=0)
        b1, b2, b3 = settings["betas"]
        subspace = TrackedSubspace(
            settings["rank"],
            settings["interval"],
            settings["leading"],
            b3,
            settings["tracking"],
            settings["first_basis"],
            settings["switching"],
        )
        rotate = check_choice("rotate_moments", settings["rotate_moments"], (None, True, False))
        if rotate is None:
            rotate = settings["first_basis"] == "gradient" and subspace.orthonormal
        residual = _residual(settings, b1)
        # Where both parts take alpha in small tensors, no pass over the update is needed for it.
        taken = not isinstance(residual, ScaledResidual)
        if isinstance(residual, OptimalCompensation):
            residual = replace(residual, compensation=residual.compensation * settings["alpha"])
        extension = LowRank(
            ProjectedDiagonal((b1, b2)),
            subspace,
            residual,
            transpose="tall" if settings["transpose_tall"] else "never",
            scale=settings["alpha"] if taken else 1.0,
            rotate_moments=rotate,
        )
        return Recipe((extension,), scale=1.0 if taken else settings["alpha"])


def _residual(settings: Mapping[str, Any], beta: float) -> Residual | None:
    """Return what becomes of the part of a gradient that the subspace does not hold."""
    kind, compensation, gamma = (settings[k] for k in ("residual", "compensation", "gamma"))
    check_choice("residual", kind, get_args(ResidualKind))
    optimal = OptimalCompensation(compensation, beta, gamma)
    if not compensation:
        return None
    if kind == "optimal":
        return optimal
    return ScaledResidual(gamma, compensation=compensation if kind == "fira+" else None)
