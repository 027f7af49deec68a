"""How the parameters under NeuRMS's rule move, in an optimizer that has other rules, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from neurms.core.ground.precision import compute_dtype
from neurms.core.ground.warn import warn_user
from neurms.core.optimizers.fallback import adamw_state
from neurms.core.optimizers.mover import Mover
from neurms.core.optimizers.view import View
from neurms.core.routing import FALLBACK, Route
from neurms.core.unitwise.engine import Engine
from neurms.core.unitwise.lengths import length_like
from neurms.core.unitwise.moves import Scaled, move_
from neurms.core.unitwise.rule import Rules
from neurms.core.unitwise.tapped import TappedLayer

__all__ = ["UnitwiseMover", "to_fallback", "velocity_like"]

_UNSEEN = "its layer was never seen in a backward pass"


class Reroutes(Protocol):
    """What a mover of NeuRMS needs of its optimizer."""

    routes: dict[Tensor, Route]

    def reroute(self, route: Route) -> None:
        """Give a parameter to another rule."""

    def opened_state(self, parameter: Tensor) -> dict[str, Any]:
        """Return a parameter's state, made if it is not there."""


class UnitwiseMover(Mover):
    """Commits what tapped layers have seen, and moves weights and biases by their factors.

    Args:
        optimizer: Holds routes and state, and this; so it had better be a weak proxy.
        engine: Holds the layers.
        rules: What groups' settings say.
    """

    def __init__(
        self,
        optimizer: Reroutes,
        engine: Engine,
        rules: Rules,
    ) -> None:
        self._optimizer = optimizer
        self._engine = engine
        self._rules = rules

    def prepare(self, views: Sequence[View]) -> None:
        """Sum statistics over ranks; give to AdamW what no backward pass has shown."""
        engine = self._engine
        moving = {id(view.parameter) for view in views}
        engine.prepare(list(engine), moving)
        unseen = engine.unseen()
        for layer in [x for x in unseen if _is_lost(x, moving)]:
            warn_user(
                f"layer {layer.name!r} has a gradient but its module was never seen in a backward "
                "pass, so its error signal is unknown and AdamW takes it; call the module itself "
                "and loss.backward(), build the optimizer before a compiled model is first used, "
                "or name the layer in exclude"
            )
            to_fallback(self._optimizer, engine, layer)
        for layer in unseen:
            if id(layer.bias) not in moving or id(layer.weight) in moving:
                continue
            warn_user(
                f"the bias of layer {layer.name!r} has a gradient and the weight has none (is it "
                "frozen?), so the error signal is unknown and AdamW takes the bias; name the layer "
                "in exclude"
            )
            bias_to_fallback(self._optimizer, layer)
        for view in views:
            rule = self._rules.of(view.group)
            if view.recipe is not rule and not view.route.is_fallback:
                view.recipe, view.bound = rule, rule.greatest(view.parameter)

    def look_at(self) -> tuple[list[Tensor], list[float]]:
        """Return the statistics of all layers."""
        return self._engine.look_at()

    def bad_names(self) -> list[str]:
        """Return layers whose statistics are not finite."""
        return self._engine.bad_names()

    def move(self, views: Sequence[View]) -> None:
        """Commit the statistics of layers that move, then move their weights and biases."""
        engine, own = self._engine, {id(view.parameter): view for view in views}
        engine.warn_of_still(engine, own)
        engine.commit(
            layer
            for layer in engine
            if layer.observed.rows and (layer.weight.grad is not None or layer.updated_in_backward)
        )
        alike: dict[int, list[Scaled]] = {}
        for layer in engine:
            weight, bias = own.get(id(layer.weight)), own.get(id(layer.bias))
            state = layer.state if weight is None else weight.state
            step = state.get("step")
            if not step or (weight is None and bias is None):
                continue
            rule = layer.rule if weight is None else weight.recipe
            factors = layer.factors_of(rule.structure, state)
            if weight is not None:
                alike.setdefault(id(weight.group), []).append(Scaled(weight, factors, step))
            if bias is not None:
                bias.state["step"] += 1
                part = Scaled(bias, (factors[0], None), bias.state["step"])
                alike.setdefault(id(bias.group), []).append(part)
        for parts in alike.values():
            rule = parts[0].view.recipe
            if rule.momentum or rule.normalize:
                for part in parts:
                    # Either may have been switched on since the state was made.
                    self._optimizer.opened_state(part.view.parameter)
            move_(parts, rule, engine.backend)

    # ---------------------------------------------------------------- state

    def state_for(self, like: Tensor, route: Route, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return a step, v and u of a weight, a velocity with momentum, a length to normalise."""
        layer = self._engine.of(route.parameter)
        state: dict[str, Any] = {"step": 0} if layer is None else layer.new_state(like)
        if group["momentum"]:
            state["momentum"] = velocity_like(like)
        if group["normalize"]:
            state["length"] = length_like(like)
        return state

    def expected_state(
        self, like: Tensor, route: Route, group: Mapping[str, Any], saved: Mapping[str, Any]
    ) -> dict[str, Any]:
        """As fresh state is, save that what may change in training follows the checkpoint.

        A layer that had gone to the fallback before saving goes there again, and a velocity or
        a length is there if momentum or ``normalize`` ever was.
        """
        if "exp_avg" in saved:
            return adamw_state(like)
        momentum = 0.9 if "momentum" in saved else 0.0
        normalize = "rms" if "length" in saved else None
        return self.state_for(like, route, {**group, "momentum": momentum, "normalize": normalize})


def to_fallback(optimizer: Reroutes, engine: Engine, layer: TappedLayer) -> None:
    """Give a layer to AdamW, and take its tap off."""
    engine.remove(layer)
    optimizer.reroute(replace(optimizer.routes[layer.weight], rule=FALLBACK, reason=_UNSEEN))
    bias_to_fallback(optimizer, layer)


def bias_to_fallback(optimizer: Reroutes, layer: TappedLayer) -> None:
    """Give a layer's bias to AdamW."""
    if layer.bias is not None:
        optimizer.reroute(replace(optimizer.routes[layer.bias], rule=FALLBACK, reason=_UNSEEN))
    layer.bias = None


def velocity_like(parameter: Tensor) -> Tensor:
    """Return a velocity of zeros for a parameter."""
    return torch.zeros_like(parameter, dtype=compute_dtype(parameter), requires_grad=False)


def _is_lost(layer: TappedLayer, moving: set[int]) -> bool:
    """Return whether a weight has a gradient that no tap has ever seen."""
    return id(layer.weight) in moving and layer.tap is not None and not layer.tap.fired
