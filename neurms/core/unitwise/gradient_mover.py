"""How matrices and their biases move by the gradient's own moments: variant P at the step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from neurms.compiled.backends import PROMPT
from neurms.compiled.gradient_factors import gradient_factors
from neurms.compiled.gradient_steps import are_good, gradient_steps_
from neurms.compiled.square_sums import average_square_sums, joint_square_sums, with_bias
from neurms.compiled.update import apply_updates_
from neurms.core.ground.precision import compute_dtype
from neurms.core.ground.shards import local, wrapped_rows
from neurms.core.ground.spans import is_observed, span
from neurms.core.ground.sums import together
from neurms.core.optimizers.by_recipe import RecipeMover, are_many
from neurms.core.optimizers.recipe import Recipe
from neurms.core.optimizers.view import View, shard_for
from neurms.core.routing import Route
from neurms.core.structures.gradient_moments import GradientMoments
from neurms.core.unitwise.gradient_layers import (
    Alike,
    Known,
    Layer,
    are_direct,
    check_bias,
)
from neurms.core.unitwise.gradient_moves import Target, apply_, moves_of
from neurms.core.unitwise.gradient_rule import partner_of
from neurms.core.unitwise.mover import velocity_like

__all__ = ["Factors", "GradientMover", "Holder", "scales", "structure_of"]

State = dict[str, Any]
Factors = tuple[Tensor, Tensor]
Sums = tuple[Tensor, Tensor]


class Holder(Protocol):
    """What the mover needs of its optimizer."""

    backend: str
    routes: dict[Tensor, Route]

    def recipe_of(self, group: Mapping[str, Any]) -> Recipe:
        """Return the recipe of a parameter group."""

    def view_of(self, parameter: Tensor) -> View:
        """Return a parameter's view."""

    def opened_state(self, parameter: Tensor) -> State:
        """Return a parameter's state, made if it is not there, with a velocity where one is due."""


class GradientMover(RecipeMover):
    """Moves matrices and their biases by the gradient's own moments, many in one call.

    Args:
        optimizer: Holds routes and state, and this; so it had better be a weak proxy.
    """

    def __init__(self, optimizer: Holder) -> None:
        super().__init__(optimizer.recipe_of)
        self._optimizer = optimizer
        self._known = Known()

    def judges(self, views: Sequence[View]) -> bool:
        """Return whether :meth:`attempt` may do: layers are known, and nobody measures each."""
        if is_observed() or not self._known.of(views):
            return False
        # Somebody may have dropped a state, or have switched momentum on. No call for a view.
        return all(
            [
                view.state and ("momentum" in view.state or not view.group["momentum"])
                for view in views
            ]
        )

    def attempt(self, views: Sequence[View]) -> bool:
        """Take the step if the sums over gradients, which it reads anyway, show them to be good."""
        alike, backend = self._known.of(views), self._backend(views)
        assert alike is not None
        for view in views:
            view.state["step"] += 1
        if len(alike) == 1 and self._in_one_call(alike[0], backend):
            return True
        sums = [_sums_of(own.layers, backend) for own in alike]
        if not are_good([rows for own in sums for rows, _ in own]):
            for view in views:
                view.state["step"] -= 1
            return False
        for own, read in zip(alike, sums, strict=True):
            self.write(own.layers, scales(own.layers, read, own.structure, backend), backend)
        return True

    def move(self, views: Sequence[View]) -> None:
        """Take the step of all layers: sums, factors and moves of each kind in one call."""
        backend = self._backend(views)
        alike = self._known.of(views)
        if alike is not None:
            self._begin(views)
        else:
            alike = self._found(views, backend)
            self._known.keep(views, alike)
        for own in alike:
            if self._in_one_call(own, backend):
                continue
            # Who measures wants each layer's time.
            for part in [[one] for one in own.layers] if is_observed() else [own.layers]:
                self.write(part, self._scales(part, own.structure, backend), backend)

    def _in_one_call(self, own: Alike, backend: str) -> bool:
        """Move layers by one kernel, if it serves all of them and finds them good.

        Args:
            own: The layers.
            backend: How kernels run.

        Returns:
            Whether they have moved.
        """
        layers, structure = own.layers, own.structure
        if backend != PROMPT or is_observed() or False in are_direct(layers):
            return False
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        there = [bias for bias in biases if bias is not None]
        targets, rates, decays = self._targets(weights, there)
        count, own_biases = len(weights), iter(targets[len(weights) :])
        bias_rates, bias_decays = iter(rates[count:]), iter(decays[count:])
        momentum, states = structure.momentum, [weight.state for weight in weights]
        return gradient_steps_.natively(
            targets[:count],
            [weight.gradient for weight in weights],
            [state["momentum"] if momentum else None for state in states],
            [None if bias is None else next(own_biases) for bias in biases],
            [None if bias is None else bias.gradient for bias in biases],
            [bias.state["momentum"] if bias and momentum else None for bias in biases],
            [state["q"] for state in states],
            [state["s"] for state in states],
            [1.0 - structure.beta ** state["step"] for state in states],
            rates[:count],
            decays[:count],
            [0.0 if bias is None else next(bias_rates) for bias in biases],
            [0.0 if bias is None else next(bias_decays) for bias in biases],
            structure.beta,
            structure.kappa,
            structure.damping,
            momentum,
            structure.nesterov,
            structure.of_averages,
        )

    def _begin(self, views: Sequence[View]) -> None:
        """Count the step of views whose layers are known."""
        for view in views:
            state = view.state
            if not state or (view.group["momentum"] and "momentum" not in state):
                view.state = state = self._optimizer.opened_state(view.parameter)
            state["step"] += 1

    def _found(self, views: Sequence[View], backend: str) -> list[Alike]:
        """Return layers that lie here whole, and move all others."""
        cut: list[Layer] = []
        whole: list[Layer] = []
        for layer in self.layers(views):
            if layer.weight.shard is not None:
                cut.append(layer)
            elif layer.weight.sharded:
                # At once: matrices that are gathered would all be whole together.
                factors = self._scales([layer], layer.structure, backend)
                self.write([layer], factors, backend)
            else:
                whole.append(layer)
        self._move_rows(cut, backend)
        return Alike.of(whole)

    def _move_rows(self, layers: Sequence[Layer], backend: str) -> None:
        """Move the rows that are here of sharded matrices, after one exchange for all of them."""
        if not layers:
            return
        parameters = [view.parameter for layer in layers for view in layer.views]
        with span("reduce", parameters):
            sums = _sums_of(layers, backend)
            works = []
            for layer, own in zip(layers, sums, strict=True):
                view, shard = layer.weight, layer.weight.shard
                assert shard is not None
                scaling = layer.structure.scaling(*own, view.own_state, view.context())
                works.append((scaling, shard))
            factors = together(works)
        for layer, made in zip(layers, factors, strict=True):
            self.write([layer], [made], backend)

    def layers(self, views: Sequence[View]) -> Iterable[Layer]:
        """Yield each matrix with its bias, its step counted."""
        own = {view.parameter: view for view in views}
        for view in views:
            weight = self._weight_of(view)
            if weight is not view and weight.parameter in own:
                continue
            other = partner_of(weight.route, self._optimizer.routes)
            bias = None if other is None else own.get(other.parameter)
            yield self._layer(weight, bias, weight.parameter in own)

    def _weight_of(self, view: View) -> View:
        """Return the view of the matrix that a parameter is, or is a column of."""
        if view.parameter.ndim >= 2:
            return view
        route = partner_of(view.route, self._optimizer.routes)
        assert route is not None, "the rule takes no vector but a bias"
        return self._optimizer.view_of(route.parameter)

    def _layer(self, weight: View, bias: View | None, moves: bool) -> Layer:
        for view in (weight, bias):
            if view is not None:
                view.state = self._optimizer.opened_state(view.parameter)
                view.state["step"] += 1
        recipe = weight.recipe or self._optimizer.recipe_of(weight.group)
        structure = structure_of(recipe)
        if not weight.sharded:
            return Layer(weight, bias, structure, moves)
        shard = shard_for(recipe, weight.parameter, weight.route.layout)
        own = replace(weight, shard=shard)
        if shard is None:
            own.gradient = own.seen(own.gradient) if moves else own.gradient
            bias = None if bias is None else replace(bias, gradient=bias.seen(bias.gradient))
        elif bias is not None:
            check_bias(bias, own)
        return Layer(own, bias, structure, moves)

    def _backend(self, views: Sequence[View]) -> str:
        backend = self._optimizer.backend
        # Small matrices together are worth what a large one is: they move in the same calls.
        return PROMPT if are_many(views) and backend == "auto" else backend

    # ---------------------------------------------------------------- moments and factors

    def _scales(
        self, layers: Sequence[Layer], structure: GradientMoments, backend: str
    ) -> list[Factors]:
        """Bring the moments of layers up to date and return the factors (m,) and (n [+ 1],)."""
        parameters = _parameters_of(layers)
        with span("reduce", parameters):
            sums = _sums_of(layers, backend)
        with span("scale", parameters):
            return scales(layers, sums, structure, backend)

    # ---------------------------------------------------------------- weights

    def write(
        self,
        layers: Sequence[Layer],
        factors: Sequence[Factors],
        backend: str,
    ) -> None:
        """Move the matrices and biases of layers by their scaled gradients."""
        structure = layers[0].structure
        direct = are_direct(layers)
        with span("update", _parameters_of(layers)):
            each = list(zip(layers, factors, direct, strict=True))
            if True in direct:
                own = [(layer, *made) for layer, made, plain in each if plain]
                self._write_direct(own, structure, backend)
            moves = [
                move
                for layer, made, plain in each
                if not plain
                for move in moves_of(layer, *made, self._target, bool(structure.momentum))
            ]
            apply_(moves, structure, backend)
            for move in moves:
                self._written(move.view, move.target)

    def _write_direct(
        self,
        parts: Sequence[tuple[Layer, Tensor, Tensor]],
        structure: GradientMoments,
        backend: str,
    ) -> None:
        """Move matrices and biases that are stored as their rule sees them, in one call."""
        momentum = structure.momentum
        weights = [layer.weight for layer, *_ in parts]
        biases = [layer.bias for layer, *_ in parts if layer.bias is not None]
        views = [*weights, *biases]
        targets, rates, decays = self._targets(weights, biases)
        apply_updates_.on(backend)(
            targets,
            [view.gradient for view in views],
            [view.state["momentum"] if momentum else None for view in views],
            [left for _, left, _ in parts]
            + [left * right[-1] for layer, left, right in parts if layer.bias is not None],
            [right[: layer.columns] for layer, _, right in parts] + [None] * len(biases),
            rates,
            decays,
            momentum,
            1.0 - momentum,
            not momentum,
            bool(momentum),
            structure.nesterov,
        )

    def _targets(
        self, weights: Sequence[View], biases: Sequence[View]
    ) -> tuple[list[Tensor], list[float], list[float]]:
        """Return what scaled gradients enter that are in the rule's dtype, as :class:`Target`."""
        views = [*weights, *biases]
        # Weight decay is for weights.
        decays = [view.decay for view in weights] + [1.0] * len(biases)
        return [v.parameter for v in views], [float(v.group["lr"]) for v in views], decays

    def _written(self, view: View, target: Tensor) -> None:
        view.written(target)

    def _target(self, view: View, decay: float) -> Target:
        """Return what a parameter's scaled gradient enters."""
        return Target(view.target(), float(view.group["lr"]), decay)

    # ---------------------------------------------------------------- state

    def state_for(self, like: Tensor, route: Route, group: Mapping[str, Any]) -> State:
        """Return a step; the roots ``q`` and ``s`` of a matrix; M with momentum."""
        structure = structure_of(self._optimizer.recipe_of(group))
        state: State = {"step": 0}
        if like.ndim >= 2:
            state |= self._moments(like, route, structure)
        if structure.momentum:
            state["momentum"] = velocity_like(like)
        return state

    def _moments(self, like: Tensor, route: Route, structure: GradientMoments) -> State:
        units, features = route.layout.matrix_shape
        features += partner_of(route, self._optimizer.routes) is not None
        recipe = Recipe((structure,))
        shard = shard_for(recipe, like, route.layout)
        shape = (units if shard is None else shard.rows, features)
        # A matrix without storage: only its shape is wanted.
        sizes = structure.init(torch.empty(shape, dtype=compute_dtype(like), device="meta"))
        made = {key: torch.zeros_like(sizes[key], device=like.device) for key in "qs"}
        if shard is None:
            return made
        return dict(wrapped_rows(made, {"q": 0, "s": None}, like, shard.total))

    def expected_state(
        self, like: Tensor, route: Route, group: Mapping[str, Any], saved: Mapping[str, Any]
    ) -> State:
        """As fresh state is, with M where it has ever been kept."""
        momentum = group["momentum"] or 0.9 if "momentum" in saved else 0.0
        return self.state_for(like, route, {**group, "momentum": momentum})


def _parameters_of(layers: Sequence[Layer]) -> list[Tensor] | None:
    """Return what layers move, for who measures; None if nobody does."""
    if not is_observed():
        return None
    return [view.parameter for layer in layers for view in layer.views]


def structure_of(recipe: Recipe) -> GradientMoments:
    """Return the structure of variant P's recipe.

    Raises:
        ValueError: The group's variant was changed.
    """
    (structure,) = recipe.transforms
    if not isinstance(structure, GradientMoments):
        raise ValueError(
            'the variant of a parameter group was changed from "P"; a variant holds for the whole '
            "optimizer: build it with the other one"
        )
    return structure


# -------------------------------------------------------------------- moments and factors


def _sums_of(layers: Sequence[Layer], backend: str) -> list[tuple[Tensor, Tensor]]:
    """Return row sums and column sums of squares of [G | g] of layers, in one call.

    Of those whose moments are an average's, of what it makes of that.
    """
    averaged = [layer.structure.mixture for layer in layers if layer.structure.of_averages]
    if averaged and (len(averaged) < len(layers) or len(set(averaged)) > 1):
        return [sums for layer in layers for sums in _sums_of([layer], backend)]
    moving = [layer for layer in layers if layer.moves]
    direct = are_direct(moving)
    biases = [
        # Where caches are cold, calls cost more than what they do.
        (None if layer.bias is None else layer.bias.gradient) if plain else layer.bias_gradient()
        for layer, plain in zip(moving, direct, strict=True)
    ]
    gradients = [
        layer.weight.gradient if plain else layer.gradient()
        for layer, plain in zip(moving, direct, strict=True)
    ]
    # A bias that has no gradient in this step, a frozen one's, counts as zero.
    widths = [layer.weight.state["s"].shape[0] for layer in moving]
    if averaged:
        averages = [layer.average() for layer in moving]
        of_biases = [layer.bias_average() for layer in moving]
        form = average_square_sums.on(backend)
        sums = form(gradients, averages, biases, of_biases, widths, *averaged[0])
    else:
        sums = joint_square_sums.on(backend)(gradients, biases, widths)
    made = zip(*sums, strict=True)
    if len(moving) == len(layers):
        return list(made)
    return [next(made) if layer.moves else _bias_sums(layer) for layer in layers]


def _bias_sums(layer: Layer) -> tuple[Tensor, Tensor]:
    """Return the sums of a matrix that has no gradient, but a bias that has one."""
    q, bias = local(layer.weight.state["q"]), layer.bias_gradient()
    assert bias is not None
    if layer.structure.of_averages:
        (fresh, kept), average = layer.structure.mixture, layer.bias_average()
        assert average is not None
        bias = bias.double() * fresh + average.double() * kept
    zeros = q.new_zeros(q.shape, dtype=torch.float64), q.new_zeros(layer.columns).double()
    return with_bias(*zeros, bias)


def scales(
    layers: Sequence[Layer],
    sums: Sequence[tuple[Tensor, Tensor]],
    structure: GradientMoments,
    backend: str,
) -> list[Factors]:
    """Bring the moments of whole layers up to date and return factors, m and n (+ 1) of each."""
    states = [layer.weight.state for layer in layers]
    rows, columns = [own[0] for own in sums], [own[1] for own in sums]
    kept = [state["q"] for state in states], [state["s"] for state in states]
    corrections = [1.0 - structure.beta ** state["step"] for state in states]
    form = gradient_factors.on(backend)
    beta, kappa, damping, one_sided = structure.bounds
    q, s, left, right = form(rows, columns, *kept, corrections, beta, kappa, damping, one_sided)
    torch._foreach_copy_([*kept[0], *kept[1]], [*q, *s])
    return list(zip(left, right, strict=True))
