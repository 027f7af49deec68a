"""Optimizers that the benchmarks alone have: they answer a question and are no method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

import neurms
from neurms.core.optimizers.recipe import Recipe
from neurms.core.structures.shared_basis import SharedBasisBlocks
from neurms.core.transforms.momentum import Momentum
from neurms.core.transforms.safeguards import Grafted
from neurms.core.unitwise.rule import Variant

__all__ = ["OWN", "MomentumFirst", "TwoRates", "create"]


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
        own: dict[str, Any] = {"params": rest, "lr": fallback_lr, "betas": fallback_betas}
        super().__init__([{"params": hidden}, own], lr=lr, betas=betas, **settings)


def moments(model: nn.Module, **settings: Any) -> neurms.NeuRMS:
    """Return NeuRMS's variant P with the head left to the fallback, as RACS and RMNP leave it."""
    return neurms.NeuRMS(model, variant="P", head="fallback", **settings)


def normalized(model: nn.Module, variant: Variant = "U", **settings: Any) -> neurms.NeuRMS:
    """Return the draft's NeuRMS with updates of a known length."""
    return neurms.NeuRMS(model, variant=variant, normalize="rms", **settings)


OWN: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "shared_basis, momentum first": MomentumFirst,
    "moments": moments,
    "adamw, two rates": TwoRates,
    "neurms, normalized": normalized,
}


def create(rule: str, model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    """Return the optimizer of a name, the benchmarks' own names among them."""
    return OWN[rule](model, **settings) if rule in OWN else neurms.create(rule, model, **settings)
