"""How the parameters under NeuRMS's rule move, in an optimizer that has other rules, too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from neurms.core.ground.precision import compute_dtype
from neurms.core.ground.warn import warn_user
from neurms.core.optimizers.fallback import adamw_state
from neurms.core.optimizers.mover import Mover
from neurms.core.optimizers.view import View
from neurms.core.optimizers.work import Work
from neurms.core.routing import FALLBACK, Route
from neurms.core.structures.unit_feature import UnitFeatureDiagonal
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

    def work(self) -> Work:
        """Return the views of all parameters."""

    def reroute(self, route: Route) -> None:
        """Give a parameter to another rule."""

    def opened_state(self, parameter: Tensor) -> dict[str, Any]:
        """Return a parameter's state, made if it is not there."""


Seat = tuple[TappedLayer, View, View | None, View | None]
"""A layer, its weight's view, and the views of weight and bias where those have a gradient."""


class Seats:
    """Which views of a step are of which layer.

    Args:
        views: The views.
        layers: All layers.
        work: The views of all parameters.
    """

    def __init__(self, views: Sequence[View], layers: list[TappedLayer], work: Work) -> None:
        self.layers = layers
        self.work = work
        self.moving = {id(view.parameter) for view in views}
        self._views = list(views)
        of = {id(view.parameter): view for view in views}
        # Those of the step, where they are: a wrapper that shares the optimizer's attributes, as
        # Fabric's does, may have made this mover, and has views of its own.
        weights = [of.get(id(x.weight)) for x in layers]
        self.each: list[Seat] = [
            (x, work.view_of(x.weight) if view is None else view, view, of.get(id(x.bias)))
            for x, view in zip(layers, weights, strict=True)
        ]
        self.without = [view for _, view, moving, _ in self.each if moving is None]
        """Views of weights that have no gradient."""

    def hold(self, views: Sequence[View], layers: Sequence[TappedLayer], work: Work) -> bool:
        """Return whether views and layers are the same. Of both, equal is identical."""
        return self.work is work and self._views == views and self.layers == layers


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
        self._seats: Seats | None = None

    def prepare(self, views: Sequence[View]) -> None:
        """Sum statistics over ranks; give to AdamW what no backward pass has shown."""
        engine = self._engine
        seats = self._seats = self._seated(views, self._optimizer.work())
        moving = seats.moving
        engine.prepare(seats.layers, moving)
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
        group: Mapping[str, Any] | None = None
        for view in [*views, *seats.without]:
            if view.group is not group:
                group, rule = view.group, self._rules.of(view.group)
            if view.recipe is not rule and not view.route.is_fallback:
                view.recipe, view.bound = rule, rule.greatest(view.parameter)

    def _seated(self, views: Sequence[View], work: Work) -> Seats:
        """Return which views are of which layer; nothing changes from step to step, as a rule."""
        layers, known = list(self._engine), self._seats
        if known is not None and known.hold(views, layers, work):
            return known
        return Seats(views, layers, work)

    def look_at(self) -> tuple[list[Tensor], list[float]]:
        """Return the statistics of all layers."""
        return self._engine.look_at()

    def bad_names(self) -> list[str]:
        """Return layers whose statistics are not finite."""
        return self._engine.bad_names()

    def move(self, views: Sequence[View]) -> None:
        """Commit the statistics of layers that move, then move their weights and biases."""
        engine, seats = self._engine, self._seats
        # What preparation has learnt may have given parameters to another rule.
        if seats is None or not seats.hold(views, list(engine), seats.work):
            seats = self._seated(views, self._optimizer.work())
        engine.warn_of_still(seats.layers, seats.moving)
        fresh = self._commit(seats)
        for parts in self._parts(seats, fresh):
            rule = parts[0][0].recipe
            if rule.momentum or rule.normalize:
                for view, _, _ in parts:
                    # Either may have been switched on since the state was made.
                    self._optimizer.opened_state(view.parameter)
            move_(parts, rule, engine.backend)

    def _commit(self, seats: Seats) -> list[bool]:
        """Have the engine commit what layers have seen; return which of them it was."""
        seen = [
            layer.observed.rows > 0
            and (
                layer.weight.grad is not None
                or (layer.tap is not None and not layer.tap.leaves_gradient)
            )
            for layer, _, _, _ in seats.each
        ]
        due: list[tuple[UnitFeatureDiagonal, TappedLayer, dict[str, Any]]] = []
        for (layer, view, weight, _), own in zip(seats.each, seen, strict=True):
            if not own:
                continue
            rule, state = view.recipe, view.state
            # Without a gradient the state is the one that backward had, if it wrote an update.
            if rule.momentum or rule.normalize or (weight is None and layer.foresight is None):
                state = view.state = self._optimizer.opened_state(layer.weight)
            due += ((rule.structure, layer, state),)
        self._engine.commit_seats(due)
        return seen

    def _parts(self, seats: Seats, fresh: Sequence[bool]) -> Iterable[list[Scaled]]:
        """Return what moves, group by group."""
        alike: dict[int, list[Scaled]] = {}
        group: Mapping[str, Any] | None = None
        own: list[Scaled] = []
        for (layer, view, weight, bias), committed in zip(seats.each, fresh, strict=True):
            if weight is None and bias is None:
                continue
            state = view.state if committed or weight is not None else layer.state
            if not state or not state["step"]:
                continue
            rule = view.recipe
            # What was committed just now is not asked whether it still holds.
            known = layer.standing if committed else None
            if known is not None and known[0][0] is rule.structure:
                factors = known[1]
            else:
                factors = layer.factors_of(rule.structure, state)
            if weight is not None:
                if weight.group is not group:
                    group, own = weight.group, alike.setdefault(id(weight.group), [])
                own += ((weight, factors, state["step"]),)
            if bias is not None:
                if bias.group is not group:
                    group, own = bias.group, alike.setdefault(id(bias.group), [])
                step = bias.state["step"] = bias.state["step"] + 1
                own += ((bias, (factors[0], None), step),)
        return alike.values()

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
