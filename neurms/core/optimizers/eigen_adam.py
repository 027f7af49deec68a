"""Eigen-Adam: Adam in the eigenbasis of the average of G G^T."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from neurms.core.ground.errors import check_betas
from neurms.core.optimizers.base import Params, PreconditionedOptimizer
from neurms.core.optimizers.recipe import Recipe
from neurms.core.optimizers.settings import CommonSettings
from neurms.core.structures.base import Transform
from neurms.core.structures.eigen_basis import EigenBasis
from neurms.core.transforms.bias_correction import BiasCorrection

__all__ = ["EigenAdam"]


class EigenAdam(PreconditionedOptimizer):
    """Adam in the eigenbasis over units: the best fit Diag_B(U D_i U^T) of the Fisher matrix.

    Q <- b3 Q + (1 - b3) G G^T and U = eigh(Q) every ``interval`` steps; the second moment is that
    of U^T G, and W moves by -lr U ((U^T M) / (sqrt(V) + eps)). State for an m x n matrix: 2 mn + 2
    m^2 numbers, on the side of the units (or the shorter one with ``transpose_tall``).

    Args:
        params: A model (routed by module kind), parameters, or parameter groups.
        lr: Learning rate.
        betas: b1 of the momentum, b2 of the second moment, b3 of G G^T.
        interval: Steps from one eigendecomposition to the next.
        eps: Added to the root of the second moment.
        transpose_tall: Take the basis over features where a matrix has more units than features.
        bias_correction: Multiply the update by sqrt(1 - b2^t) / (1 - b1^t). False is the paper,
            whose updates are three to seven times as long as Adam's in the first thousand steps.
        **common: :class:`~neurms.core.optimizers.settings.CommonSettings`.

    Raises:
        ValueError: A setting is out of its range.
        TypeError: An unknown setting, or a parameter that is not real floating point.

    Reference:
        "Towards Efficient Optimizer Design for LLM via Structured Fisher Approximation with a
        Low-Rank Extension", Algorithm 7; also known as AdaDiag and one-sided SOAP. Settled
        here: coordinates that hold rounding noise only get no update.

    Example:
        >>> import torch, neurms
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)
        ... )
        >>> optimizer = neurms.EigenAdam(model)
        >>> model(torch.randn(3, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    rule = "eigen_adam"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.999),
        interval: int = 10,
        eps: float = 1e-8,
        transpose_tall: bool = False,
        bias_correction: bool = False,
        **common: Unpack[CommonSettings],
    ) -> None:
        settings = {
            "lr": lr,
            "betas": betas,
            "interval": interval,
            "eps": eps,
            "transpose_tall": transpose_tall,
            "bias_correction": bias_correction,
        }
        super().__init__(params, settings, common)

    @classmethod
    def recipe(cls, settings: Mapping[str, Any]) -> Recipe:
        """Return Adam in the eigenbasis, with Adam's bias correction on request."""
        check_betas("betas", settings["betas"], 3)
        betas = tuple(settings["betas"])
        structure = EigenBasis(
            betas, settings["interval"], settings["eps"], settings["transpose_tall"]
        )
        # A null space has no basis of its own, and LAPACK's choice hangs on the last bits of the
        # Gram matrix, which differ between a batched and a single product of small matrices.
        transforms: tuple[Transform, ...] = (structure,)
        if settings["bias_correction"]:
            transforms = (structure, BiasCorrection(betas[:2]))
        return Recipe(transforms, batched=False)
