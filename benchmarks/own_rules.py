"""Optimizers that the benchmarks alone have: they answer a question and are no method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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

__all__ = [
    "OWN",
    "MomentumFirst",
    "Moments",
    "NormalizedLength",
    "ProbedMoments",
    "TwoRates",
    "create",
]


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
        return self.averaged(update, state) * by_unit[..., :, None] * by_feature[..., None, :]


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


class NormalizedLength(neurms.NeuRMS):
    """NeuRMS whose update has a known length: one more number of state a layer.

    What a step did to a layer is divided by the bias-corrected average (decay .9) of its weight's
    RMS, at a rate of 1. Bias and weight share the number.
    """

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take NeuRMS's step, then give each layer's change its length."""
        if not hasattr(self, "_lengths"):
            self._lengths = self._layers()
        before = [[p.detach().clone() for p in layer] for layer, _ in self._lengths]
        result = super().step(closure)
        with torch.no_grad():
            for (layer, state), old in zip(self._lengths, before, strict=True):
                self._scale(layer, state, old)
        return result

    def _layers(self) -> list[tuple[list[Tensor], list[float]]]:
        groups = self.param_groups
        named = {
            name: p for g in groups for name, p in zip(g["param_names"], g["params"], strict=True)
        }
        layers: dict[str, list[Tensor]] = {}
        for row in self.plan():
            if row.rule != "fallback":
                layers.setdefault(row.name.rpartition(".")[0], []).append(named[row.name])
        # The weight first: its RMS is the layer's.
        return [(sorted(own, key=lambda p: -p.ndim), [0.0, 0.0]) for own in layers.values()]

    def _scale(self, layer: list[Tensor], state: list[float], before: list[Tensor]) -> None:
        lr = next(g["lr"] for g in self.param_groups if any(layer[0] is p for p in g["params"]))
        if not lr:
            return
        moved = (layer[0] - before[0]).square().mean().sqrt().item() / float(lr)
        state[0] = 0.9 * state[0] + 0.1 * moved
        state[1] = 0.9 * state[1] + 0.1
        if state[0]:
            for weight, old in zip(layer, before, strict=True):
                weight.sub_(old).mul_(state[1] / state[0]).add_(old)


OWN: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "shared_basis, momentum first": MomentumFirst,
    "moments": Moments,
    "adamw, two rates": TwoRates,
    "neurms, normalized": NormalizedLength,
}


def create(rule: str, model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    """Return the optimizer of a name, the benchmarks' own names among them."""
    return OWN[rule](model, **settings) if rule in OWN else neurms.create(rule, model, **settings)
