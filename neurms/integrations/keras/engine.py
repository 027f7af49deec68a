"""The torch optimizer inside a Keras one: the same rule, fed with Keras's variables and gradients.

Keras brings learning rate, clipping, accumulation, averaging and saving; the rule, its batches, the
fallback and every number come from the library's torch optimizer, so that both move alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from neurms.core.ground.errors import UnsupportedTrainingError
from neurms.core.ground.spans import gradients_ready
from neurms.core.optimizers.base import PreconditionedOptimizer
from neurms.core.optimizers.registry import optimizer_class
from neurms.core.optimizers.view import View
from neurms.core.routing import Route, RoutedModel
from neurms.core.unitwise.engine import Engine as Layers
from neurms.core.unitwise.neurms import NeuRMS
from neurms.core.unitwise.tapped import TappedLayer
from neurms.integrations.keras.taps import ActivationTap

__all__ = ["Engine", "make_engine"]


class Engine:
    """A rule's torch optimizer on Keras's variables, with what Keras wants done otherwise.

    Args:
        optimizer: The optimizer, made of routed variables.
    """

    def __init__(self, optimizer: PreconditionedOptimizer) -> None:
        self.optimizer = optimizer
        self._undecayed: frozenset[Tensor] = frozenset()

    @property
    def layers(self) -> Layers:
        """The tapped layers of a rule that has some, whose taps are attached step by step."""
        assert isinstance(self.optimizer, NeuRMS)
        return self.optimizer.layers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Mapping[Tensor, Any]:
        """The optimizer's state by parameter."""
        return self.optimizer.state

    def fallback_lr(self, group: Mapping[str, Any]) -> float:
        """Return AdamW's rate at a group's present ``lr``."""
        return self.optimizer.fallback_lr(group)

    @torch.no_grad()
    def advance(self, gradients: Mapping[Tensor, Tensor], lr: float) -> None:
        """Take one step with the given gradients.

        Args:
            gradients: Parameter -> gradient of its shape.
            lr: Learning rate of this step.

        Raises:
            NonFiniteError: One is not finite and ``nonfinite="raise"``; nothing was changed.
            UnsupportedTrainingError: No tap has seen the error signals of a kernel.
        """
        optimizer = self.optimizer
        for group in optimizer.param_groups:
            group["lr"] = lr
        gradients_ready()
        work = optimizer.work()
        try:
            views = work.due(gradients)
            self._refuse_unseen({view.parameter for view in views})
            optimizer.take(views, first=lambda: self._decay_rest(views))
        finally:
            work.release()

    def _decay_rest(self, views: Iterable[View]) -> None:
        """Decay what no rule decays: in Keras weight decay is for every variable not excluded."""
        for view in views:
            ruled = view.rule == self.optimizer.rule and view.parameter.ndim > 1
            if view.decay != 1.0 and not ruled and view.parameter not in self._undecayed:
                view.parameter.mul_(view.decay)

    def exempt(self, parameters: Iterable[Tensor]) -> None:
        """Take parameters out of weight decay, into a group of their own."""
        self._undecayed = frozenset(parameters)
        groups = self.optimizer.param_groups
        if not self._undecayed or not groups[0]["weight_decay"]:
            return
        pairs = list(zip(groups[0]["param_names"], groups[0]["params"], strict=True))
        for owner, out in ((groups[0], False), ({**groups[0], "weight_decay": 0.0}, True)):
            own = [pair for pair in pairs if (pair[1] in self._undecayed) is out]
            owner["param_names"] = [name for name, _ in own]
            owner["params"] = [parameter for _, parameter in own]
            if out:
                groups.append(owner)

    def _refuse_unseen(self, moving: set[Tensor]) -> None:
        if not isinstance(self.optimizer, NeuRMS):
            return
        due = [layer for layer in self.layers if layer.weight in moving]
        if due and not any(layer.pending.rows for layer in due):
            raise UnsupportedTrainingError(
                "no tap was attached when these gradients were computed. Taps attach in fit and "
                "train_on_batch of a model that holds the optimizer (compiled with it, or as an "
                "attribute, in a list or in a dict of the model) if it was built before, by "
                "optimizer.build(variables); put any other loop into "
                "`with optimizer.attach(model):`"
            )
        lost = [layer.name for layer in due if not (layer.pending.rows or layer.state["step"])]
        if lost:
            raise UnsupportedTrainingError(
                f"the kernel {lost[0]!r} has a gradient but its layer was never called, or never "
                "called its activation, so its error signal is unknown; call the layer itself, or "
                f"pass exclude=({lost[0]!r},) to leave it to AdamW"
            )


def make_engine(rule: str, routes: Sequence[Route], settings: Mapping[str, Any]) -> Engine:
    """Return an engine for routed variables with the given settings, ``lr`` among them."""
    make: Callable[..., PreconditionedOptimizer] = optimizer_class(rule)
    return Engine(make(RoutedModel(routes, _tap_for), **settings))


def _tap_for(layer: TappedLayer) -> ActivationTap:
    features = layer.rule.structure.factored
    backend = layer.backend
    module, weight = layer.route.module, layer.weight
    return ActivationTap(module, weight, layer, features=features, backend=backend)
