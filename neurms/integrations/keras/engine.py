"""The torch optimizer inside a Keras one: the same rule, fed with Keras's variables and gradients.

Keras brings learning rate, clipping, accumulation, averaging and saving; the rule, its batches, the
fallback and every number come from the library's torch optimizer, so that both move alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neurms.core.ground.errors import UnsupportedTrainingError
from neurms.core.ground.spans import gradients_ready
from neurms.core.optimizers.base import PreconditionedOptimizer
from neurms.core.optimizers.registry import optimizer_class
from neurms.core.optimizers.work import Item
from neurms.core.routing import Head, Route
from neurms.core.unitwise.layers import UnitwiseLayers
from neurms.core.unitwise.tapped import TappedLayer
from neurms.core.unitwise.unitwise_optimizer import UnitwiseOptimizer
from neurms.integrations.keras.taps import ActivationTap

__all__ = ["Engine", "KerasLayers", "TappedEngine", "engine_class", "make_engine"]


class RoutedVariables(nn.Module):
    """Stands for a model that has been routed already."""

    def __init__(self, routes: Sequence[Route]) -> None:
        super().__init__()
        self.routes = list(routes)


class Engine(PreconditionedOptimizer):
    """What is the same in every rule's engine; mixed in before the rule's own class."""

    undecayed: frozenset[Tensor] = frozenset()
    """Parameters that Keras's weight decay leaves out."""

    def _route(self, model: nn.Module, head: Head) -> list[Route]:
        assert isinstance(model, RoutedVariables)
        return model.routes

    @torch.no_grad()
    def advance(self, gradients: Mapping[Tensor, Tensor], lr: float) -> None:
        """Take one step with the given gradients.

        Args:
            gradients: Parameter -> gradient of its shape.
            lr: Learning rate of this step.

        Raises:
            NonFiniteError: One is not finite and ``nonfinite="raise"``; nothing was changed.
        """
        for group in self.param_groups:
            group["lr"] = lr
        gradients_ready()
        self._take(list(self._items(gradients)))

    def _items(self, gradients: Mapping[Tensor, Tensor]) -> Iterable[Item]:
        index = -1
        for group in self.param_groups:
            for parameter in group["params"]:
                index += 1
                if parameter in gradients and parameter.numel():
                    yield Item(index, self._routes[parameter], group, gradients[parameter])

    def _update(self, items: Sequence[Item]) -> None:
        self._decay_rest(items)
        super()._update(items)

    def _decay_rest(self, items: Sequence[Item]) -> None:
        """Decay what no rule decays: in Keras weight decay is for every variable not excluded."""
        for item in items:
            decay = item.group["weight_decay"]
            ruled = item.rule == self.rule and item.parameter.ndim > 1
            if decay and not ruled and item.parameter not in self.undecayed:
                item.parameter.mul_(1.0 - float(item.group["lr"]) * decay)

    def exempt(self, parameters: Iterable[Tensor]) -> None:
        """Take parameters out of weight decay, into a group of their own."""
        self.undecayed = frozenset(parameters)
        group = self.param_groups[0]
        if not self.undecayed or not group["weight_decay"]:
            return
        pairs = list(zip(group["param_names"], group["params"], strict=True))
        for owner, out in ((group, False), ({**group, "weight_decay": 0.0}, True)):
            own = [pair for pair in pairs if (pair[1] in self.undecayed) is out]
            owner["param_names"] = [name for name, _ in own]
            owner["params"] = [parameter for _, parameter in own]
            if out:
                self.param_groups.append(owner)


class KerasTappedLayer(TappedLayer):
    """A layer whose gradients Keras may accumulate elsewhere than in ``.grad``."""

    accumulates = False

    def _follow_gradient(self) -> None:
        if not self.accumulates:
            super()._follow_gradient()


class KerasLayers(UnitwiseLayers):
    """Layers under the rule with taps for Keras, which are attached step by step."""

    def attach(
        self,
        routes: Iterable[Route],
        *,
        features: bool,
        in_backward: bool = False,
        model: nn.Module | None = None,
    ) -> None:
        """Make a layer and a tap for each kernel among ``routes``; no tap is attached yet."""
        routes, owner = list(routes), self._owner()
        assert owner is not None
        biases = {id(r.module): r.parameter for r in routes if r.parameter.ndim < 2}
        for route in routes:
            if route.parameter.ndim >= 2:
                bias, heads = biases.get(id(route.module)), self._heads_of(route)
                layer = KerasTappedLayer(route, bias, owner, heads)
                layer.tap = ActivationTap(
                    route.module, route.parameter, layer, features=features, backend=owner.backend
                )
                self._layers[route.parameter] = layer
        self._check_heads()

    def attach_taps(self) -> None:
        """Attach all taps, or none."""
        try:
            for layer in self:
                assert layer.tap is not None
                layer.tap.attach()
        except BaseException:
            self.detach()
            raise


class TappedEngine(Engine, UnitwiseOptimizer):
    """The part of an engine whose rule reads D and H."""

    layers_class = KerasLayers

    @property
    def layers(self) -> KerasLayers:
        """The tapped layers."""
        assert isinstance(self._layers, KerasLayers)
        return self._layers

    def _bad_names(self, items: Sequence[Item]) -> list[str]:
        self._refuse_unseen({item.parameter for item in items})
        return super()._bad_names(items)

    def _refuse_unseen(self, moving: set[Tensor]) -> None:
        due = [layer for layer in self.layers if layer.weight in moving]
        if due and not any(layer.pending.rows for layer in due):
            raise UnsupportedTrainingError(
                "no tap was attached when these gradients were computed. Taps attach in fit and "
                "train_on_batch of a model that holds the optimizer (compiled with it, or as an "
                "attribute, in a list or in a dict of the model) if it was built before, by "
                "optimizer.build(variables); put any other loop into "
                "`with optimizer.attach(model):`"
            )
        lost = [
            layer.name for layer in due if not (layer.pending.rows or self.state_of(layer)["step"])
        ]
        if lost:
            raise UnsupportedTrainingError(
                f"the kernel {lost[0]!r} has a gradient but its layer was never called, or never "
                "called its activation, so its error signal is unknown; call the layer itself, or "
                f"pass exclude=({lost[0]!r},) to leave it to AdamW"
            )


def engine_class(rule: str) -> type[Engine]:
    """Return the engine of a rule: its torch optimizer on routed variables."""
    maker = optimizer_class(rule)
    mixin = TappedEngine if issubclass(maker, UnitwiseOptimizer) else Engine
    return type(f"Keras{maker.__name__}Engine", (mixin, maker), {})


def make_engine(rule: str, routes: Sequence[Route], settings: Mapping[str, Any]) -> Engine:
    """Return an engine for routed variables with the given settings, ``lr`` among them."""
    make: Any = engine_class(rule)
    engine: Engine = make(RoutedVariables(routes), **settings)
    return engine
