"""How the parameters under NeuRMS's rule move, in an optimizer that has other rules, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from neurms.core.ground.precision import compute_dtype
from neurms.core.ground.shards import local, row_shard
from neurms.core.ground.spans import is_observed, span
from neurms.core.ground.warn import warn_user
from neurms.core.optimizers.fallback import adamw_state
from neurms.core.optimizers.mover import Mover
from neurms.core.optimizers.view import View
from neurms.core.routing import FALLBACK, Route
from neurms.core.unitwise.engine import Engine
from neurms.core.unitwise.lengths import Length, length_like, normalized
from neurms.core.unitwise.moments import Factors
from neurms.core.unitwise.moves import Move, write_moves_
from neurms.core.unitwise.rule import Rules, UnitwiseRule
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
        moving = {view.parameter for view in views}
        engine.prepare(list(engine), moving)
        for layer in [x for x in engine.unseen() if _is_lost(x, moving)]:
            warn_user(
                f"layer {layer.name!r} has a gradient but its module was never seen in a backward "
                "pass, so its error signal is unknown and AdamW takes it; call the module itself "
                "and loss.backward(), build the optimizer before a compiled model is first used, "
                "or name the layer in exclude"
            )
            to_fallback(self._optimizer, engine, layer)
        for layer in [x for x in engine.unseen() if x.bias in moving and x.weight not in moving]:
            warn_user(
                f"the bias of layer {layer.name!r} has a gradient and the weight has none (is it "
                "frozen?), so the error signal is unknown and AdamW takes the bias; name the layer "
                "in exclude"
            )
            bias_to_fallback(self._optimizer, layer)
        for view in views:
            view.bound = self._rules.of(view.group).greatest(view.parameter)

    def look_at(self) -> tuple[list[Tensor], list[float]]:
        """Return the statistics of all layers."""
        return self._engine.look_at()

    def bad_names(self) -> list[str]:
        """Return layers whose statistics are not finite."""
        return self._engine.bad_names()

    def move(self, views: Sequence[View]) -> None:
        """Commit the statistics of layers that move, then move their weights and biases."""
        engine, own = self._engine, {view.parameter: view for view in views}
        engine.warn_of_still(engine, own)
        engine.commit(
            layer
            for layer in engine
            if layer.observed.rows and (layer.updated_in_backward or layer.weight.grad is not None)
        )
        alike: dict[int, list[tuple[View, Factors]]] = {}
        for layer in engine:
            weight, bias = own.get(layer.weight), own.get(layer.bias)  # type: ignore[arg-type]
            if (weight or bias) is None or not layer.state.get("step"):
                continue
            s, c = layer.factors()
            if weight is not None:
                alike.setdefault(id(weight.group), []).append((weight, (s, c)))
            if bias is not None:
                self._optimizer.opened_state(bias.parameter)["step"] += 1
                alike.setdefault(id(bias.group), []).append((bias, (s, None)))
        for parts in alike.values():
            if self._rules.of(parts[0][0].group).normalize:
                self._move_normalized(parts)
                continue
            # Who measures wants each parameter's time.
            for part in [[one] for one in parts] if is_observed() else [parts]:
                self._move(part)

    def _move(self, parts: Sequence[tuple[View, Factors]]) -> None:
        rule = self._rules.of(parts[0][0].group)
        with span("update", [view.parameter for view, _ in parts]):
            moves = [self._move_of(view, factors, rule) for view, factors in parts]
            self._write([view for view, _ in parts], moves, rule)

    def _move_normalized(self, parts: Sequence[tuple[View, Factors]]) -> None:
        # Measured all together, observed or not: the other ranks take part in one exchange.
        rule = self._rules.of(parts[0][0].group)
        views = [view for view, _ in parts]
        with span("scale", [view.parameter for view in views]):
            moves = [self._move_of(view, factors, rule) for view, factors in parts]
            lengths = [self._length_of(view) for view in views]
            moves = normalized(moves, lengths, rule, self._engine.backend)
        pairs = list(zip(views, moves, strict=True))
        for part in [[one] for one in pairs] if is_observed() else [pairs]:
            own = [view for view, _ in part]
            with span("update", [view.parameter for view in own]):
                self._write(own, [move for _, move in part], rule)

    def _write(self, views: Sequence[View], moves: Sequence[Move], rule: UnitwiseRule) -> None:
        write_moves_([m for m in moves if m.target.numel()], rule, self._engine.backend)
        for view, move in zip(views, moves, strict=True):
            view.written(move.target)

    def _length_of(self, view: View) -> Length:
        parameter, layout = view.parameter, view.route.layout
        state = self._optimizer.opened_state(parameter)
        shard = row_shard(parameter, layout) if view.sharded else None
        return Length(state["length"], state["step"], parameter.numel(), shard)

    def _move_of(self, view: View, factors: Factors, rule: UnitwiseRule) -> Move:
        target, gradient, layout = view.target(), view.gradient, view.route.layout
        velocity = None
        if rule.momentum:
            velocity = self._optimizer.opened_state(view.parameter)["momentum"]
        if view.sharded:
            shard = row_shard(view.parameter, layout)
            assert shard is not None, "other cuts are refused when layers are attached"
            layout, s, c = shard.narrowed(layout, *factors)
            assert s is not None
            factors, gradient = (s, c), local(gradient)
            velocity = None if velocity is None else local(velocity)
        # Weight decay is for weights.
        decay = view.decay if view.parameter.ndim >= 2 else 1.0
        rate = float(view.group["lr"])
        return Move(target, gradient, velocity, layout, factors, rate, decay, target)

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


def _is_lost(layer: TappedLayer, moving: set[Tensor]) -> bool:
    """Return whether a weight has a gradient that no tap has ever seen."""
    return layer.weight in moving and layer.tap is not None and not layer.tap.fired
