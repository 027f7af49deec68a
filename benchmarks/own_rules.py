"""Optimizers that the benchmarks alone have: they answer a question and are no method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import neurms
from neurms.core.optimizers.recipe import Recipe
from neurms.core.structures.shared_basis import SharedBasisBlocks
from neurms.core.transforms.momentum import Momentum
from neurms.core.transforms.safeguards import Grafted

__all__ = ["OWN", "MomentumFirst", "create"]


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


OWN: dict[str, type[neurms.SharedBasis]] = {"shared_basis, momentum first": MomentumFirst}


def create(rule: str, model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    """Return the optimizer of a name, the benchmarks' own names among them."""
    return OWN[rule](model, **settings) if rule in OWN else neurms.create(rule, model, **settings)
