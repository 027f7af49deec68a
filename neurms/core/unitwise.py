"""The tapped layers of a model: which ones, their taps, their joint commit."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from neurms.core.errors import NonFiniteError
from neurms.core.routing import FALLBACK, Head, Route, excluded, route_model
from neurms.core.statistics import PendingSums, synchronize, world_size
from neurms.core.tapped import LayerOwner, TappedLayer
from neurms.core.taps.activity import activity_of
from neurms.core.taps.backward import BackwardUpdateTap
from neurms.core.taps.guard import GradientGuard
from neurms.core.taps.hooks import HookTap, forget_compiled_graphs
from neurms.core.taps.protocol import Sums

__all__ = ["UnitwiseLayers", "neurms_routes"]


def neurms_routes(
    model: nn.Module, rule: str, head: Head, exclude: Sequence[str]
) -> list[Route]:
    """Route a model for a rule that needs D and H, the head and the layers' biases included.

    Raises:
        ValueError: No layer of the model can be tapped, or a pattern of ``exclude`` matches nothing.
    """
    routes = [_tappable(route) for route in route_model(model, rule, head=head)]
    routes = excluded(routes, exclude)
    weights = {id(r.module): r for r in routes if not r.is_fallback}
    routes = [_with_weight(route, weights, rule) for route in routes]
    routes = excluded(routes, exclude)
    if not weights:
        kinds = sorted({route.kind for route in routes}) or [type(model).__name__]
        raise ValueError(
            f"model={type(model).__name__} has no layer that {rule} can tap (a trainable, untied Linear or "
            f"convolution that is not excluded); its parameters belong to {kinds}"
        )
    return routes


def _tappable(route: Route) -> Route:
    if route.is_fallback:
        return route
    if isinstance(route.module, (nn.MultiheadAttention, NonDynamicallyQuantizableLinear)):
        reason = "inside nn.MultiheadAttention, whose projections are never called as layers"
        return replace(route, rule=FALLBACK, reason=reason)
    if route.module is None or activity_of(route.module) is None:
        return replace(route, rule=FALLBACK, reason=f"{route.kind} shows no error signal to tap")
    return route


def _with_weight(route: Route, weights: Mapping[int, Route], rule: str) -> Route:
    """Return a bias's route as its layer's rule has it."""
    owner = weights.get(id(route.module))
    if owner is None or route is owner or route.reason != "bias":
        return route
    return replace(route, rule=rule, reason=f"bias of {owner.name}: scaled by its s")


class UnitwiseLayers:
    """The layers under NeuRMS's rule, for the optimizer or a callback that owns them.

    Args:
        owner: Holds state and settings.
        heads: Name pattern of weights -> number of heads that share second moments.
    """

    def __init__(self, owner: LayerOwner, heads: Mapping[str, int] | None = None) -> None:
        self._owner = owner
        self._heads = dict(heads or {})
        self._layers: dict[Tensor, TappedLayer] = {}
        self._bad: list[str] = []
        self._updated: list[str] = []

    def __iter__(self) -> Iterator[TappedLayer]:
        return iter(self._layers.values())

    def of(self, weight: Tensor) -> TappedLayer | None:
        """Return the layer of a weight, or None."""
        return self._layers.get(weight)

    # ------------------------------------------------------------- taps

    def attach(self, routes: Iterable[Route], *, features: bool, in_backward: bool = False) -> None:
        """Make a layer of each weight among ``routes`` and put its tap in place.

        Args:
            routes: Weights and biases under the rule.
            features: Whether H is observed too.
            in_backward: Whether linear layers are updated during backward.

        Raises:
            ValueError: A pattern of ``heads`` matches no weight, or does not divide its outputs.
        """
        routes = list(routes)
        biases = {id(r.module): r.parameter for r in routes if r.parameter.ndim < 2}
        for route in routes:
            if route.parameter.ndim >= 2:
                bias = biases.get(id(route.module))
                self._layers[route.parameter] = TappedLayer(
                    route, bias, self._owner, self._heads_of(route)
                )
        self._check_heads()
        for layer in self:
            layer.tap = self._tap(layer, features, in_backward)
            layer.tap.attach()
        if any(_is_compiled(layer.route.module) for layer in self):
            forget_compiled_graphs()

    def _tap(
        self, layer: TappedLayer, features: bool, in_backward: bool
    ) -> HookTap | BackwardUpdateTap:
        module = layer.route.module
        assert module is not None
        if in_backward and type(module) is nn.Linear:
            return BackwardUpdateTap(module, layer, name=layer.name)
        return HookTap(
            module, layer.weight, layer, features=features, backend=self._owner.backend
        )

    def _heads_of(self, route: Route) -> int:
        return next((n for pattern, n in self._heads.items() if fnmatchcase(route.name, pattern)), 0)

    def _check_heads(self) -> None:
        for pattern, heads in self._heads.items():
            hits = [layer for layer in self if fnmatchcase(layer.name, pattern)]
            if not hits:
                names = [layer.name for layer in self][:5]
                raise ValueError(f"heads={pattern!r} matches no weight; weights are {names}")
            for layer in hits:
                units = layer.route.layout.units
                if not isinstance(heads, int) or heads < 1 or units % heads:
                    raise ValueError(
                        f"heads[{pattern!r}]={heads!r} must divide the {units} outputs of {layer.name!r}"
                    )

    def detach(self) -> None:
        """Remove every tap."""
        for layer in self:
            if layer.tap is not None:
                layer.tap.detach()

    def remove(self, layer: TappedLayer) -> None:
        """Take a layer out and its tap off."""
        del self._layers[layer.weight]
        if layer.tap is not None:
            layer.tap.detach()

    def guard_gradients(self, routes: Mapping[Tensor, Route]) -> GradientGuard:
        """Return a guard over the gradients that do exist, to notice clipping and unscaling."""
        rest = [p for p in routes if not (p in self._layers and self._layers[p].updated_in_backward)]
        return GradientGuard(rest)

    # ------------------------------------------------------------- pending statistics

    def clear(self) -> None:
        """Drop pending statistics and let backward updates begin anew."""
        self._bad.clear()
        self._updated.clear()
        for layer in self:
            layer.clear()
            if isinstance(layer.tap, BackwardUpdateTap):
                layer.tap.rearm()

    def synchronize(self) -> None:
        """Sum pending statistics over ranks."""
        if world_size() == 1 or not self._layers:
            return
        layers = list(self)
        synchronize(
            [layer.pending for layer in layers],
            [layer.sizes for layer in layers],
            self._owner.loss_reduction,
            layers[0].weight,
        )

    def nonfinite_names(self) -> list[str]:
        """Return the layers whose pending statistics hold a NaN or an infinity."""
        observed = [layer for layer in self if layer.pending.units is not None]
        if not observed:
            return list(self._bad)
        sums = [s.sum() for layer in observed for s in _tensors(layer.pending)]
        if bool(torch.isfinite(torch.stack([s.float() for s in sums])).all()):
            return list(self._bad)
        return self._bad + [layer.name for layer in observed if not layer.pending.is_finite()]

    def accepts(self, layer: TappedLayer, sums: Sums, nonfinite: str) -> bool:
        """Return whether a backward update may be written; its D and H must be finite.

        Raises:
            NonFiniteError: They are not and ``nonfinite`` is ``"raise"``; names what was updated before.
        """
        pending = PendingSums()
        pending.add(sums)
        if pending.is_finite():
            self._updated.append(layer.name)
            return True
        if nonfinite == "skip":
            self._bad.append(layer.name)
            return False
        before = self._updated[:] or ["none"]
        self.clear()
        raise NonFiniteError(
            f"the error signal or input of {layer.name!r} is NaN or infinite; it was left as it was, but "
            f'update="backward" had already updated in this pass: {", ".join(before)}. Lower lr, or use '
            'update="step", which checks everything before it changes anything'
        )

    def unfired(self, moving: set[Tensor], state: Mapping[Tensor, Any]) -> list[TappedLayer]:
        """Return layers that have a gradient though their module was never called; warns of each once.

        Args:
            moving: Parameters that have a gradient in this step.
            state: State by parameter; a layer with statistics has been called.
        """
        lost = [
            layer
            for layer in self
            if layer.weight in moving
            and layer.tap is not None
            and not layer.tap.fired
            and not state.get(layer.weight)
        ]
        for layer in lost:
            warnings.warn(
                f"layer {layer.name!r} has a gradient but its module was never called, so its error "
                "signal is unknown and AdamW takes it; call the module itself, or name it in exclude",
                UserWarning,
                stacklevel=4,
            )
        return lost


def _tensors(pending: PendingSums) -> list[Tensor]:
    return [sums for sums in (pending.units, pending.features) if sums is not None]


def _is_compiled(module: nn.Module | None) -> bool:
    return module is not None and getattr(module, "_compiled_call_impl", None) is not None
