"""Optimizers that the benchmarks alone have: they answer a question and are no method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor, nn

import neurms
from neurms.core.optimizers.base import Params, PreconditionedOptimizer
from neurms.core.optimizers.recipe import Recipe
from neurms.core.optimizers.settings import CommonSettings
from neurms.core.structures.base import Context, State
from neurms.core.structures.gradient_moments import GradientMoments
from neurms.core.structures.shared_basis import SharedBasisBlocks
from neurms.core.transforms.momentum import Momentum
from neurms.core.transforms.safeguards import Grafted

__all__ = ["OWN", "MomentumFirst", "Moments", "ProbedMoments", "TwoRates", "create"]


class MomentumFirst(neurms.SharedBasis):
    """SharedBasis of the gradients' average, as Muon, RMNP and Alice precondition theirs.

    The paper's order is the other one: each step's own gradient is preconditioned, and momentum
    sums the results.
    """

    @classmethod
    def recipe(cls, settings: Mapping[str, Any]) -> Recipe:
        """Return an averaging momentum followed by the grafted shared-basis structure."""
        blocks = SharedBasisBlocks(settings["rank"], settings["decay"], settings["eps"])
        return Recipe((Momentum(settings["momentum"]), Grafted(blocks, settings["grafting"])))


class Moments(PreconditionedOptimizer):
    """The gradient's own moments as a recipe: variant P's matrices, routed as RACS's are.

    Heads and biases go to the fallback, where NeuRMS's variant P takes them.
    """

    rule = "moments"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-2,
        beta: float = 0.95,
        kappa: float = 10.0,
        momentum: float = 0.0,
        probes: int = 0,
        **common: Unpack[CommonSettings],
    ) -> None:
        settings = {"lr": lr, "beta": beta, "kappa": kappa, "momentum": momentum, "probes": probes}
        super().__init__(params, settings, common)

    @classmethod
    def recipe(cls, settings: Mapping[str, Any]) -> Recipe:
        """Return the structure alone, of exact sums or of so many probes."""
        chosen = settings["beta"], settings["kappa"], settings["momentum"]
        probes = settings["probes"]
        return Recipe((ProbedMoments(*chosen, probes) if probes else GradientMoments(*chosen),))


@dataclass(frozen=True)
class ProbedMoments(GradientMoments):
    """Moments from the products of G with random signs: what a G that is never formed can tell.

    Args:
        probes: Pairs of vectors of +-1 in a step.
    """

    probes: int = 4

    def __call__(self, update: Tensor, state: State, context: Context) -> Tensor:
        """Observe probes of the gradient (..., m, n) and return it scaled by what they gave."""
        m, n = update.shape[-2:]
        # The same signs in a repeated run: they follow from the step and the shape.
        generator = torch.Generator().manual_seed(hash((context.step, m, n)))
        right, left = (
            torch.randint(2, (size, self.probes), generator=generator).to(update) * 2 - 1
            for size in (n, m)
        )
        rows = (update @ right).double().square().mean(-1)
        columns = (update.mT @ left).double().square().mean(-1)
        by_unit, by_feature = self.scales(rows, columns, state, context)
        return self._averaged(update, state) * by_unit[..., :, None] * by_feature[..., None, :]


class TwoRates(torch.optim.AdamW):
    """AdamW with a rate and betas of its own for what other rules leave to their fallback.

    What is left of a rule's lead over this is the rule's; the rest is that of two rates over one.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        betas: tuple[float, float],
        fallback_lr: float,
        fallback_betas: tuple[float, float],
        **settings: Any,
    ) -> None:
        plan = neurms.RMNP(model).plan()
        outside = {row.name for row in plan if row.rule == "fallback"}
        hidden, rest = (
            [p for name, p in model.named_parameters() if (name in outside) == away]
            for away in (False, True)
        )
        own = {"params": rest, "lr": fallback_lr, "betas": fallback_betas}
        super().__init__([{"params": hidden}, own], lr=lr, betas=betas, **settings)


OWN: dict[str, type[torch.optim.Optimizer]] = {
    "shared_basis, momentum first": MomentumFirst,
    "moments": Moments,
    "adamw, two rates": TwoRates,
}


def create(rule: str, model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    """Return the optimizer of a name, the benchmarks' own names among them."""
    return OWN[rule](model, **settings) if rule in OWN else neurms.create(rule, model, **settings)
