"""SharedBasis: a full block for each unit, all of them low-rank in one basis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from neurms.core.optimizers.base import Params, PreconditionedOptimizer
from neurms.core.optimizers.recipe import Recipe
from neurms.core.optimizers.settings import CommonSettings
from neurms.core.structures.shared_basis import SharedBasisBlocks
from neurms.core.transforms.momentum import Momentum
from neurms.core.transforms.safeguards import Grafted, Grafting

__all__ = ["SharedBasis"]


class SharedBasis(PreconditionedOptimizer):
    """Block-diagonal AdaGrad: a block B R_i B^T + rho_i I for each unit, with a shared B.

    Row i of the update is (B R_i B^T + (rho_i + eps) I)^(-1/2) g_i, where g_i is row i of G, B (n x
    k) an orthonormal basis of the leading eigenspace of sum_i M_i^2 by one subspace iteration a
    step, R_i (k x k) unit i's second moment in it and rho_i a bound on what is cut off; see
    :class:`~neurms.core.structures.shared_basis.SharedBasisBlocks`. The result is grafted to
    another method's length, then momentum: V <- momentum V + U ; W <- W - lr V. State: nk + m k^2 +
    m numbers, and mn each for grafting (except "sgd") and momentum. For convolutions the blocks are
    the output channels.

    Args:
        params: A model (routed by module kind), parameters, or parameter groups.
        lr: Learning rate.
        rank: k, reduced to n for matrices with fewer features. Each step solves m eigenproblems of
            size k, in a native kernel where k is at most 64 and m k^2 at least 2^15.
        decay: Factor of the old statistics; 1 sums them as AdaGrad does.
        eps: Added to every eigenvalue.
        momentum: Heavy-ball momentum of the grafted update.
        grafting: ``None``, ``"sgd"``, ``"adam"``, ``"rmsprop"`` or ``"rmsprop_normalized"``: whose
            length the update gets.
        oversampling: Further directions p iterated along with the k, of which the best k are taken;
            np numbers of state.
        iterations: Rounds of subspace iteration in each step.
        norm_iterations: Products for the spectral norm in rho_i, which it approaches from below: 8
            come within about a percent, 16 within rounding.
        **common: :class:`~neurms.core.optimizers.settings.CommonSettings`.

    Raises:
        ValueError: A setting is out of its range.
        TypeError: An unknown setting, or a parameter that is not real floating point.

    Reference:
        "Block Low-Rank Preconditioner with Shared Basis for Stochastic Optimization", Yen et al.,
        NeurIPS 2023, Algorithm 1. The paper gives no learning rate for all tasks; the default suits
        RMSPROP_NORMALIZED grafting, whose updates have entries of about 1, under momentum.

    Example:
        >>> import torch, neurms
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)
        ... )
        >>> optimizer = neurms.SharedBasis(model, lr=1e-3, rank=2)
        >>> model(torch.randn(3, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    rule = "shared_basis"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        rank: int = 32,
        decay: float = 1.0,
        eps: float = 1e-6,
        momentum: float = 0.9,
        grafting: Grafting | None = "rmsprop_normalized",
        oversampling: int = 0,
        iterations: int = 1,
        norm_iterations: int = 8,
        **common: Unpack[CommonSettings],
    ) -> None:
        settings = {
            "lr": lr,
            "rank": rank,
            "decay": decay,
            "eps": eps,
            "momentum": momentum,
            "grafting": grafting,
            "oversampling": oversampling,
            "iterations": iterations,
            "norm_iterations": norm_iterations,
        }
        super().__init__(params, settings, common)

    @classmethod
    def recipe(cls, settings: Mapping[str, Any]) -> Recipe:
        """Return the grafted shared-basis structure followed by momentum."""
        blocks = SharedBasisBlocks(
            settings["rank"],
            settings["decay"],
            settings["eps"],
            settings["norm_iterations"],
            settings["oversampling"],
            settings["iterations"],
        )
        grafted = Grafted(blocks, settings["grafting"])
        return Recipe((grafted, Momentum(settings["momentum"], average=False)))
