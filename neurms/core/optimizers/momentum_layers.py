"""Gradients that enter their momentum during backward and are never formed."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from neurms.compiled.finite import are_small, within
from neurms.core.ground.precision import compute_dtype
from neurms.core.ground.shards import is_sharded
from neurms.core.ground.spans import spanning
from neurms.core.optimizers.recipe import Recipe
from neurms.core.optimizers.settings import NonFinite
from neurms.core.optimizers.view import View
from neurms.core.routing import Route
from neurms.core.taps.backward import BackwardUpdateTap
from neurms.core.taps.products import Product, add_product_
from neurms.core.taps.tap_set import TapSet, has_own_linear
from neurms.core.transforms.momentum import Momentum

__all__ = ["Entry", "MomentumLayer", "MomentumLayers", "check_gathers"]


Entry = tuple[float, float]
"""What enters a momentum M, beside what is kept of it: (a, b) of a G + b W."""


class Owner(Protocol):
    """What the layers ask of their optimizer."""

    backend: str
    nonfinite: NonFinite

    def recipe_of(self, group: Mapping[str, Any]) -> Recipe:
        """Return the recipe of a parameter group."""

    def view_of(self, parameter: Tensor) -> View:
        """Return a parameter's view, with its state of now."""

    def open(self, view: View) -> None:
        """Make a parameter's state if it is not there."""

    def entry(self, view: View, recipe: Recipe, product: Product) -> Entry:
        """Return what a gradient that is not formed enters the momentum with."""


def check_gathers(momentum: Momentum) -> None:
    """Raise unless a momentum can take a gradient that is never formed.

    Raises:
        ValueError: It looks ahead, or there is none.
    """
    if momentum.nesterov:
        raise ValueError(
            'nesterov=True cannot go with update="backward": looking ahead needs the gradient '
            'itself, which is never formed; pass nesterov=False, or use update="step"'
        )
    if not momentum.momentum:
        raise ValueError(
            f'momentum={momentum.momentum!r} cannot go with update="backward", which writes '
            'gradients into the momentum; pass a positive momentum, or use update="step"'
        )


class MomentumLayer:
    """One linear layer, whose gradient goes into its weight's momentum; the sink of its tap.

    M <- kept M + a D^T H, where ``kept`` is mu at the first backward since the last step, and 1 at
    those that follow: the parts of a batch add up, as they do in ``.grad``.

    Args:
        route: The weight's route.
        layers: Holds it; held weakly.
    """

    def __init__(self, route: Route, layers: MomentumLayers) -> None:
        self.route = route
        self.weight = route.parameter
        self.begun = False
        """Whether M holds a gradient that no step has taken."""
        self.recipe: Recipe | None = None
        """What M has been averaged by, and the step goes on with."""
        self.tap: BackwardUpdateTap | None = None
        self.dirty = False
        self._layers = weakref.ref(layers)
        self._task: int | None = None
        self._bound: tuple[Recipe | None, torch.dtype | None, float] = (None, None, 0.0)

    @property
    def layers(self) -> MomentumLayers:
        """What holds the layer."""
        layers = self._layers()
        if layers is None:
            raise ReferenceError(f"the optimizer of layer {self.route.name!r} no longer exists")
        return layers

    def rescale_errors(self, errors: Tensor) -> None:
        """Leave D as it is."""

    def update(self, errors: Tensor, activations: Tensor) -> None:
        """Have D and H of one backward enter M, if they are good."""
        layers = self._layers() or self.layers
        owner = layers.owner_ref() or layers.owner
        view = owner.view_of(self.weight)
        recipe = owner.recipe_of(view.group)
        known, dtype, bound = self._bound
        if known is not recipe or dtype is not self.weight.dtype:
            check_gathers(recipe.momentum)
            bound = recipe.greatest(self.weight)
            self._bound = recipe, self.weight.dtype, bound
        self.dirty = True
        if not layers.judges(self, _fit(errors, activations, bound)):
            return
        task, before = torch._C._current_graph_task_id(), self._task
        self._task = task
        if self.begun and task != before:
            self._look_for_dropped()
        if not view.state:
            owner.open(view)
        product = Product(errors, activations, backend=owner.backend)
        spanning("update", [self.weight], self._enter, owner, view, recipe, product)

    def _enter(self, owner: Owner, view: View, recipe: Recipe, product: Product) -> None:
        momentum = recipe.momentum
        velocity = momentum.velocity(view.state)
        gradient, weight = owner.entry(view, recipe, product)
        kept = 1.0 if self.begun else momentum.momentum
        self.begun, self.recipe = True, recipe
        add_product_(velocity, product, (None, None), -gradient, kept)
        if weight:
            velocity.add_(view.weight, alpha=weight)

    def _look_for_dropped(self) -> None:
        """Begin anew where ``model.zero_grad()`` has dropped gradients: the bias's tells."""
        bias = self.route.module.bias if isinstance(self.route.module, nn.Linear) else None
        if bias is not None and bias.requires_grad and bias.grad is None:
            self.layers.warn_of_dropped([self.route.name])
            self.begun = False

    def clear(self) -> None:
        """Forget that no step has taken what M holds."""
        self.begun, self._task, self.dirty = False, None, False


class MomentumLayers(TapSet[MomentumLayer, Owner]):
    """The layers whose gradients enter their momentum in backward.

    Args:
        owner: The optimizer; held weakly.
        once: Whether what enters depends on all of a step's gradient, which then has to come in
            one backward.
    """

    def __init__(self, owner: Owner, *, once: bool = False) -> None:
        super().__init__(owner)
        self._once = once

    def attach(self, model: nn.Module, routes: Iterable[Route], rule: str) -> None:
        """Tap the linear layers whose weights a rule takes, all or none.

        Args:
            model: Holds the layers.
            routes: Of all parameters.
            rule: The optimizer's own.

        Raises:
            UnsupportedTrainingError: Several ranks train.
            ValueError: A weight is tapped by another optimizer.
        """
        known = list(routes)
        own = [r for r in known if r.rule == rule and has_own_linear(r)]
        layers = [MomentumLayer(r, self) for r in own if not is_sharded(r.parameter)]
        for layer in layers:
            layer.tap = self._tap_of(layer)
        self.hold(layers, model, [route.parameter for route in known])
        self.put()

    def follow(self, old: Route, new: Route) -> None:
        """Have a tap follow its weight to the parameter in its place."""
        if (layer := self.replace(old, new)) is not None:
            layer.tap = self._tap_of(layer)
            layer.tap.attach()

    def _tap_of(self, layer: MomentumLayer) -> BackwardUpdateTap:
        module = layer.route.module
        assert isinstance(module, nn.Linear)
        once = self._once
        name = layer.route.name
        return BackwardUpdateTap(module, layer, name=name, writes=False, once=once, rescales=False)

    def judges(self, layer: MomentumLayer, good: bool) -> bool:
        """Return whether a layer's signals may enter its momentum.

        Not either once a step will be left out: all that comes later stays as it was.
        """
        return not self._bad and super().judges(layer, good)

    @property
    def begun(self) -> list[str]:
        """Names of the layers whose momentum holds a gradient that no step has taken."""
        return [layer.route.name for layer in self if layer.begun]

    def clear(self) -> None:
        """Forget what no step has taken, and let backward begin anew."""
        if self._once:
            super().clear()
            return
        self._bad.clear()
        self._updated.clear()
        # Taps that count nothing need no word of it, after each step and once more in zero_grad.
        for layer in self._layers.values():
            if layer.dirty:
                layer.clear()

    def forget(self) -> None:
        """Begin anew, along with gradients."""
        self.warn_of_dropped(self.begun)
        super().forget()


def _fit(errors: Tensor, activations: Tensor, bound: float) -> bool:
    """Return whether D and H are finite, and no entry of D^T H beyond a bound."""
    rows, room = errors.shape[0] or 1, bound / 4.0
    # Float32 and wider hold the root; what is narrower has to hold it, too.
    each = (room / rows) ** 0.5
    if errors.dtype is not torch.float32:
        each = min(each, torch.finfo(errors.dtype).max)
    signals = [errors, activations]
    if are_small(signals, [each, each]) or within(signals, [each, each]):
        return True
    # One may be large where the other is small. A NaN makes the comparison fail.
    wide = compute_dtype(errors)
    d, h = (float(torch.linalg.vector_norm(x, math.inf, dtype=wide)) for x in (errors, activations))
    return rows * d * h <= room
