"""Variant P in backward: D and H become probed moments and an update, never a gradient."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from neurms.compiled.backends import PROMPT
from neurms.compiled.finite import are_small, within
from neurms.compiled.gradient_factors import gradient_factors
from neurms.compiled.native import LEAST_ELEMENTS
from neurms.compiled.probes import mean_squares, probe_products
from neurms.core.ground.precision import compute_dtype
from neurms.core.ground.spans import spanning
from neurms.core.optimizers.recipe import Recipe
from neurms.core.optimizers.settings import NonFinite
from neurms.core.optimizers.view import View
from neurms.core.routing import Route
from neurms.core.structures.base import Context
from neurms.core.structures.gradient_moments import GradientMoments
from neurms.core.taps.backward import BackwardUpdateTap
from neurms.core.taps.products import Product, add_product_
from neurms.core.taps.tap_set import TapSet, has_own_linear
from neurms.core.unitwise.gradient_mover import structure_of
from neurms.core.unitwise.gradient_rule import check_average
from neurms.core.unitwise.rule import Gemm

__all__ = ["Foreseen", "ProbedLayer", "ProbedLayers", "drawn_probes"]


class Owner(Protocol):
    """What probed layers ask of their optimizer."""

    backend: str
    nonfinite: NonFinite
    routes: dict[Tensor, Route]

    def recipe_of(self, group: Mapping[str, Any]) -> Recipe:
        """Return the recipe of a parameter group."""

    def view_of(self, parameter: Tensor) -> View:
        """Return a parameter's view."""

    def opened_state(self, parameter: Tensor) -> dict[str, Any]:
        """Return a parameter's state, made if it is not there."""


class Foreseen(NamedTuple):
    """What a commit of one backward gives: the roots q and s, and the factors that they make."""

    q: Tensor
    s: Tensor
    left: Tensor
    right: Tensor


def drawn_probes(
    seed: int, step: int, sizes: tuple[int, int], count: int, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Return random signs (n, count) and (m, count), the same wherever seed and step are.

    Args:
        seed: Of the layer.
        step: The step's number.
        sizes: n and m.
        count: Pairs of probes.
        like: Gives device and dtype.
    """
    generator = Context(step, None, (seed,)).generator(0)
    # The generator goes row by row: these are the draws of two calls, one after the other.
    signs = torch.randint(0, 2, (sum(sizes), count), generator=generator)
    right, left = signs.mul_(2).sub_(1).to(like).split(sizes)
    return right, left


class ProbedLayer:
    """One linear layer; the sink of its tap.

    Without momentum its weight moves as soon as D and H are there. With momentum they enter M, and
    what the probes have seen is summed, until the step moves the weight: parts of a batch add up.

    Args:
        route: The weight's route.
        layers: Holds it; held weakly.
        waits: Whether the weight waits for the step.
    """

    def __init__(self, route: Route, layers: ProbedLayers, waits: bool) -> None:
        self.route = route
        self.weight = route.parameter
        self.waits = waits
        self.foreseen: Foreseen | None = None
        self.products: tuple[Tensor, Tensor] | None = None
        self.tap: BackwardUpdateTap | None = None
        self.dirty = False
        self._layers = weakref.ref(layers)
        self._probes: tuple[Tensor, Tensor] | None = None

    @property
    def layers(self) -> ProbedLayers:
        """What holds the layer."""
        layers = self._layers()
        if layers is None:
            raise ReferenceError(f"the optimizer of layer {self.route.name!r} no longer exists")
        return layers

    def rescale_errors(self, errors: Tensor) -> None:
        """Leave D as it is."""

    def update(self, errors: Tensor, activations: Tensor) -> None:
        """Take D and H of one backward."""
        self.dirty = True
        layers = self._layers() or self.layers
        owner = layers.owner_ref() or layers.owner
        view = owner.view_of(self.weight)
        view.state = owner.opened_state(self.weight)
        structure = structure_of(owner.recipe_of(view.group))
        if bool(structure.momentum) != self.waits:
            raise ValueError(
                f"momentum={structure.momentum!r} was {'positive' if self.waits else 'zero'} when "
                'the optimizer was built, and update="backward" cannot begin or end to keep an '
                'average; build it anew, or use update="step"'
            )
        if structure.nesterov or structure.of_averages:
            check_average(view.group)
        backend = PROMPT if layers.large and owner.backend == "auto" else owner.backend
        probes = self._probes or self._drawn(view)
        form = probe_products.on(backend)
        products = spanning("reduce", [self.weight], form, errors, activations, *probes)
        # Whatever is not finite in D or H has made a product NaN or infinite.
        seen = [x if x.is_contiguous() else x.contiguous() for x in products]
        bounds = [torch.finfo(x.dtype).max for x in seen]
        if not layers.judges(self, are_small(seen, bounds) or within(seen, bounds)):
            return
        product = Product(errors, activations, None, layers.gemm, backend)
        take = self._gather if self.waits else self._write
        spanning("update", [self.weight], take, view, structure, product, products)

    def _drawn(self, view: View) -> tuple[Tensor, Tensor]:
        """Return this step's probes, drawn once for all parts of its batch."""
        q, s = view.state["q"], view.state["s"]
        sizes, count = (s.numel(), q.numel()), int(view.group["probes"])
        self._probes = drawn_probes(view.seed, view.state["step"] + 1, sizes, count, q)
        return self._probes

    def _gather(
        self,
        view: View,
        structure: GradientMoments,
        product: Product,
        products: tuple[Tensor, Tensor],
    ) -> None:
        mu, velocity = structure.momentum, view.state["momentum"]
        before, sign = self.products, -1.0 if view.group["maximize"] else 1.0
        kept = mu if before is None else 1.0
        add_product_(velocity, product, (None, None), -(1.0 - mu) * sign, kept)
        wide = compute_dtype(self.weight)
        fresh = products[0].to(wide), products[1].to(wide)
        self.products = fresh if before is None else (before[0] + fresh[0], before[1] + fresh[1])

    def _write(
        self,
        view: View,
        structure: GradientMoments,
        product: Product,
        products: tuple[Tensor, Tensor],
    ) -> None:
        state, features = view.state, product.activations.size(1)
        rows, columns = mean_squares(products[0]), mean_squares(products[1])
        correction = 1.0 - structure.beta ** (state["step"] + 1)
        (q,), (s,), (left,), (right,) = gradient_factors.on(product.backend)(
            [rows], [columns], [state["q"]], [state["s"]], [correction],
            *structure.bounds,
        )  # fmt: skip
        self.foreseen = Foreseen(q, s, left, right)
        rate = float(view.group["lr"]) * (-1.0 if view.group["maximize"] else 1.0)
        target = view.target()
        add_product_(target, product, (left, right[:features]), rate, view.decay)
        view.written(target)

    def clear(self) -> None:
        """Forget what no step has committed."""
        self.foreseen = self.products = self._probes = None
        self.dirty = False


class ProbedLayers(TapSet[ProbedLayer, Owner]):
    """The layers that variant P moves without a gradient.

    Args:
        owner: The optimizer; held weakly.
        gemm: What D and H are multiplied in.
    """

    def __init__(self, owner: Owner, gemm: Gemm) -> None:
        super().__init__(owner)
        self.gemm: Gemm = gemm
        self.large = False
        """Whether kernels run natively where they are small, too: beside a large weight."""

    def attach(self, model: nn.Module, routes: Iterable[Route]) -> None:
        """Tap the linear layers among ``routes``, all or none.

        A layer waits for the step if its group has momentum.

        Raises:
            UnsupportedTrainingError: Several ranks train.
            ValueError: A weight is tapped by another optimizer.
        """
        known = list(routes)
        tapped = [
            (route, self.owner.view_of(route.parameter)) for route in known if has_own_linear(route)
        ]
        layers = [ProbedLayer(route, self, bool(view.group["momentum"])) for route, view in tapped]
        for layer in layers:
            layer.tap = _tap_of(layer)
        self.hold(layers, model, [route.parameter for route in known])
        self.large = any(layer.weight.numel() >= LEAST_ELEMENTS for layer in layers)
        self.put()

    def follow(self, old: Route, new: Route) -> None:
        """Have a tap follow its weight to the parameter in its place."""
        if (layer := self.replace(old, new)) is not None:
            layer.tap = _tap_of(layer)
            layer.tap.attach()

    def forget(self) -> None:
        """Drop pending statistics along with gradients."""
        self.warn_of_dropped([layer.route.name for layer in self if layer.products is not None])
        super().forget()


def _tap_of(layer: ProbedLayer) -> BackwardUpdateTap:
    module = layer.route.module
    assert isinstance(module, nn.Linear)
    name, writes = layer.route.name, not layer.waits
    return BackwardUpdateTap(module, layer, name=name, writes=writes, rescales=False)
