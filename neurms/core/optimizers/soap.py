"""SOAP: Adam in the eigenbases of Shampoo's two factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from neurms.core.ground.errors import check_betas
from neurms.core.optimizers.base import Params, PreconditionedOptimizer
from neurms.core.optimizers.recipe import Recipe
from neurms.core.optimizers.settings import CommonSettings
from neurms.core.structures.two_sided_eigen import TwoSidedEigen

__all__ = ["SOAP"]


class SOAP(PreconditionedOptimizer):
    """Adam in the eigenbases of E[G G^T] and E[G^T G].

    The bases follow the averages by one round of orthogonal iteration every ``interval`` updates.
    The first step only initialises them: nothing moves. State for an m x n matrix:
    2 mn + 2 m^2 + 2 n^2 numbers.

    Args:
        params: A model (routed by module kind), parameters, or parameter groups.
        lr: Learning rate.
        betas: b1 of the momentum and b2 of the second moment.
        shampoo_beta: Decay of the averages of G G^T and G^T G; None takes b2.
        eps: Added to the root of the second moment.
        interval: Updates from one round of the bases to the next.
        max_preconditioned_dim: A side longer than this is not rotated and keeps no basis.
        stagger: Turn the bases of different matrices at different steps of the interval, chosen by
            their names, so that no step has all of that work. The authors' code turns all at once.
        **common: :class:`~neurms.core.optimizers.settings.CommonSettings`.

    Raises:
        ValueError: A setting is out of its range.
        TypeError: An unknown setting, or a parameter that is not real floating point.

    Reference:
        Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", 2024, in the form of the
        authors' code (AdaDiag++ is the same structure). Departures: parameters of more than two
        axes are flattened to units x features; ``weight_decay`` is 0 unless set; entries that hold
        rounding noise only get no update.

    Example:
        >>> import torch, neurms
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)
        ... )
        >>> optimizer = neurms.SOAP(model)
        >>> model(torch.randn(3, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    rule = "soap"

    def __init__(
        self,
        params: Params,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float | None = None,
        eps: float = 1e-8,
        interval: int = 10,
        max_preconditioned_dim: int = 10000,
        stagger: bool = False,
        **common: Unpack[CommonSettings],
    ) -> None:
        settings = {
            "lr": lr,
            "betas": betas,
            "shampoo_beta": shampoo_beta,
            "eps": eps,
            "interval": interval,
            "max_preconditioned_dim": max_preconditioned_dim,
            "stagger": stagger,
        }
        super().__init__(params, settings, common)

    @classmethod
    def recipe(cls, settings: Mapping[str, Any]) -> Recipe:
        """Return the two-sided eigenbasis; decay follows the update from the second step on."""
        check_betas("betas", settings["betas"], 2)
        structure = TwoSidedEigen(
            tuple(settings["betas"]),
            settings["shampoo_beta"],
            settings["eps"],
            settings["interval"],
            settings["max_preconditioned_dim"],
            settings["stagger"],
        )
        # A null space has no basis of its own, and LAPACK's choice hangs on the last bits of the
        # Gram matrix, which differ between a batched and a single product of small matrices.
        return Recipe((structure,), decay="after", decay_from=2, batched=False)
