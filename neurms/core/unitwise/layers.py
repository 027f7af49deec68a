"""The tapped layers of a model: which ones, their taps, their joint commit."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from neurms.compiled.backends import PROMPT
from neurms.compiled.finite import GREATEST, within
from neurms.compiled.native import LEAST_ELEMENTS, fits
from neurms.core.ground.errors import NonFiniteError, UnsupportedTrainingError
from neurms.core.ground.shards import is_sharded, mesh_of, row_shard
from neurms.core.ground.spans import span
from neurms.core.optimizers.settings import NonFinite
from neurms.core.routing import FALLBACK, Head, Route, excluded, route_model
from neurms.core.taps.activity import activity_of
from neurms.core.taps.backward import BackwardUpdateTap, is_tapped_linear
from neurms.core.taps.guard import GradientGuard
from neurms.core.taps.hooks import HookTap, forget_compiled_graphs
from neurms.core.taps.protocol import Sums
from neurms.core.unitwise.statistics import PendingSums, synchronize, world_size
from neurms.core.unitwise.tapped import LayerOwner, TappedLayer

__all__ = ["UnitwiseLayers", "neurms_routes"]


def neurms_routes(model: nn.Module, rule: str, head: Head, exclude: Sequence[str]) -> list[Route]:
    """Route a model for a rule that needs D and H, the head and the layers' biases included.

    Raises:
        ValueError: No layer of the model can be tapped, or a pattern of ``exclude`` matches
            nothing.
    """
    routes = [_tappable(route) for route in route_model(model, rule, head=head)]
    routes = excluded(routes, exclude)
    weights = {id(r.module): r for r in routes if not r.is_fallback}
    routes = [_with_weight(route, weights, rule) for route in routes]
    routes = excluded(routes, exclude)
    if not weights:
        kinds = sorted({route.kind for route in routes}) or [type(model).__name__]
        raise ValueError(
            f"model={type(model).__name__} has no layer that {rule} can tap (an untied Linear or "
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
    if route.parameter.requires_grad and not owner.parameter.requires_grad:
        return replace(route, reason="bias of a frozen weight, whose error signal is not observed")
    return replace(route, rule=rule, reason=f"bias of {owner.name}: scaled by its s")


class UnitwiseLayers:
    """The layers under NeuRMS's rule, for the optimizer or a callback that owns them.

    Args:
        owner: Holds state and settings; held weakly.
        heads: Name pattern of weights -> number of heads that share second moments.
    """

    def __init__(self, owner: LayerOwner, heads: Mapping[str, int] | None = None) -> None:
        self._owner = weakref.ref(owner)
        named = isinstance(heads, Mapping) and all(isinstance(pattern, str) for pattern in heads)
        if heads is not None and not named:
            raise TypeError(
                f"heads={heads!r} must map name patterns of weights to numbers of heads"
            )
        self._heads = dict(heads or {})
        self.large = False
        self._compiled = False
        self._layers: dict[Tensor, TappedLayer] = {}
        self._bad: list[str] = []
        self._updated: list[str] = []

    def __iter__(self) -> Iterator[TappedLayer]:
        return iter(self._layers.values())

    def of(self, weight: Tensor) -> TappedLayer | None:
        """Return the layer of a weight, or None."""
        return self._layers.get(weight)

    # ------------------------------------------------------------- taps

    def attach(
        self,
        routes: Iterable[Route],
        *,
        features: bool,
        in_backward: bool = False,
        model: nn.Module | None = None,
    ) -> None:
        """Make a layer of each weight among ``routes`` and put its tap in place, all or none.

        Args:
            routes: Weights and biases under the rule.
            features: Whether H is observed too.
            in_backward: Whether linear layers are updated during backward.
            model: Holds the layers; if it is compiled, it is traced anew so that taps are seen.

        Raises:
            ValueError: A pattern of ``heads`` matches no weight, or does not divide its outputs; a
                weight is tapped in another module.
            UnsupportedTrainingError: Several ranks train and ``in_backward`` is set, or a weight is
                sharded otherwise than by its units over all ranks.
        """
        routes, owner = list(routes), self._owner()
        assert owner is not None
        for route in routes:
            check_rows(route)
        biases = {id(r.module): r.parameter for r in routes if r.parameter.ndim < 2}
        for route in routes:
            if route.parameter.ndim >= 2:
                bias = biases.get(id(route.module))
                heads = self._heads_of(route)
                self._layers[route.parameter] = TappedLayer(route, bias, owner, heads)
        self._check_heads()
        modules = [layer.route.module for layer in self] if model is None else model.modules()
        self._compiled = any(map(_is_compiled, modules))
        self.large = any(layer.weight.numel() >= LEAST_ELEMENTS for layer in self)
        self.large = self.large and owner.backend == "auto"
        try:
            for layer in self:
                layer.prompt = self.large
                layer.tap = self._tap(layer, layer.backend, features, in_backward)
                layer.tap.attach()
        except BaseException:
            self.detach()
            raise
        if self._compiled:
            forget_compiled_graphs()

    @staticmethod
    def _tap(
        layer: TappedLayer, backend: str, features: bool, in_backward: bool
    ) -> HookTap | BackwardUpdateTap:
        module = layer.route.module
        assert module is not None
        # A subclass may be one that a dead optimizer's tap has left behind.
        if in_backward and (type(module) is nn.Linear or is_tapped_linear(module)):
            assert isinstance(module, nn.Linear)
            return BackwardUpdateTap(module, layer, name=layer.name)
        in_graph = "rescale" if layer.owner.variant_of(layer) == "B" else "observe"
        return HookTap(
            module, layer.weight, layer, features=features, backend=backend, in_graph=in_graph
        )

    def _heads_of(self, route: Route) -> int:
        return next(
            (n for pattern, n in self._heads.items() if fnmatchcase(route.name, pattern)), 0
        )

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
                        f"heads[{pattern!r}]={heads!r} must divide the {units} outputs of "
                        f"{layer.name!r}"
                    )

    def detach(self) -> None:
        """Remove every tap."""
        for layer in self:
            if layer.tap is not None:
                layer.tap.detach()
        if self._compiled:
            forget_compiled_graphs()

    def remove(self, layer: TappedLayer) -> None:
        """Take a layer out and its tap off."""
        del self._layers[layer.weight]
        if layer.tap is not None:
            layer.tap.detach()

    def guard_gradients(self, parameters: Iterable[Tensor]) -> GradientGuard:
        """Return a guard over gradients that exist, to notice what should act on those that do not.

        Without a layer that is updated in backward there is nothing to guard.
        """
        without = {layer.weight for layer in self if layer.updated_in_backward}
        return GradientGuard(p for p in parameters if p not in without and without)

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
        """Sum pending statistics over ranks: from here on they are each layer's ``observed``."""
        owner = self._owner()
        if world_size() == 1 or not self._layers or owner is None:
            return
        layers = list(self)
        with span("reduce", [layer.weight for layer in layers]):
            synchronize(
                [layer.begin_synchronization() for layer in layers],
                [layer.sizes for layer in layers],
                owner.loss_reduction,
                layers[0].weight,
            )

    def nonfinite_names(self) -> list[str]:
        """Return the layers whose observed statistics hold a NaN or an infinity."""
        observed = self._unjudged()
        if not observed:
            return list(self._bad)
        greatest = min(x.observed.greatest() for x in observed)
        sums = [s for x in observed for s in _tensors(x.observed)]
        if within(sums, [greatest] * len(sums)):
            return list(self._bad)
        return self._bad + [layer.name for layer in observed if not layer.observed.is_finite()]

    def are_finite_with(self, gradients: Sequence[Tensor]) -> bool:
        """Return whether one look suffices: gradients and statistics are plain, and all is well."""
        if not self.large or self._bad:
            return False
        observed = [layer.observed for layer in self._unjudged()]
        sums = [(s, pending.greatest()) for pending in observed for s in _tensors(pending)]
        tensors = [*gradients, *[s for s, _ in sums]]
        bounds = [GREATEST] * len(gradients) + [bound for _, bound in sums]
        return fits(*tensors) and within.on(PROMPT)(tensors, bounds)

    def _unjudged(self) -> list[TappedLayer]:
        """Return layers with statistics, but for those that backward has looked at."""
        seen = set(self._updated) if self._updated and world_size() == 1 else ()
        return [x for x in self if x.observed.units is not None and x.name not in seen]

    @property
    def updated(self) -> list[str]:
        """Names of the layers that backward has updated since the last step."""
        return list(self._updated)

    def accepts(
        self, layer: TappedLayer, sums: Sums, nonfinite: NonFinite, activations: Tensor
    ) -> bool:
        """Return whether a backward update may be written; its D and H must be finite.

        Args:
            layer: The layer.
            sums: Its sums; H's need not be among them.
            nonfinite: Whether a bad layer is left out, or all is called off.
            activations: H.

        Raises:
            NonFiniteError: They are not and ``nonfinite`` is ``"raise"``; names what was updated
                before.
        """
        if _are_finite(sums, activations, layer):
            self._updated.append(layer.name)
            return True
        if nonfinite == "skip":
            self._bad.append(layer.name)
            return False
        before = ", ".join(self._updated) or "no layer"
        self.clear()
        for other in self:
            if isinstance(other.tap, BackwardUpdateTap):
                other.tap.abandon()
        raise NonFiniteError(
            f"the error signal or input of {layer.name!r} is NaN or infinite; it was left as it "
            f'was, but update="backward" had already updated in this pass: {before}. Lower lr, or '
            'use update="step", which checks everything before it changes anything'
        )

    def refuse_removed(self, moving: set[Tensor]) -> None:
        """Raise if a layer about to move has lost its hook to somebody else.

        Raises:
            UnsupportedTrainingError: It would be scaled by statistics of long ago, unnoticed.
        """
        for layer in self:
            tap = layer.tap
            if layer.weight in moving and isinstance(tap, HookTap) and tap.removed:
                raise UnsupportedTrainingError(
                    f"the tap of layer {layer.name!r} was removed from its module (were its "
                    "forward hooks cleared?), so its error signal is no longer seen; keep the "
                    "hooks, build the optimizer anew, or detach() it to go on with the statistics "
                    "it has"
                )

    def unfired(self, moving: set[Tensor], state: Mapping[Tensor, Any]) -> list[TappedLayer]:
        """Return layers whose weight has a gradient that no tap on any rank saw; warns of each.

        Args:
            moving: Parameters that have a gradient in this step.
            state: State by parameter; a layer with statistics has been seen.
        """
        lost = [
            layer
            for layer in self._unknown(state)
            if layer.weight in moving and layer.tap is not None and not layer.tap.fired
        ]
        for layer in lost:
            _warn(
                f"layer {layer.name!r} has a gradient but its module was never seen in a backward "
                "pass, so its error signal is unknown and AdamW takes it; call the module itself "
                "and loss.backward(), build the optimizer before a compiled model is first used, "
                "or name the layer in exclude"
            )
        return lost

    def orphans(self, moving: set[Tensor], state: Mapping[Tensor, Any]) -> list[TappedLayer]:
        """Return layers whose bias has a gradient but whose weight never had one; warns of each.

        Args:
            moving: Parameters that have a gradient in this step.
            state: State by parameter; a layer with statistics has been seen.
        """
        lost = [
            layer
            for layer in self._unknown(state)
            if layer.bias in moving and layer.weight not in moving
        ]
        for layer in lost:
            _warn(
                f"the bias of layer {layer.name!r} has a gradient and the weight has none (is it "
                "frozen?), so the error signal is unknown and AdamW takes the bias; name the layer "
                "in exclude"
            )
        return lost

    def _unknown(self, state: Mapping[Tensor, Any]) -> Iterator[TappedLayer]:
        for layer in self:
            if not layer.observed.rows and not state.get(layer.weight):
                yield layer


def check_rows(route: Route) -> None:
    """Raise unless ``route``'s parameter is whole, or sharded by units over all ranks that train.

    Raises:
        UnsupportedTrainingError: It is cut in another way, for which s has no part to act on.
    """
    if not is_sharded(route.parameter):
        return
    if row_shard(route.parameter, route.layout) is None:
        raise UnsupportedTrainingError(
            f"{route.name!r} is sharded as {route.parameter.placements}; "  # type: ignore[attr-defined]
            "NeuRMS needs Shard(0) over one axis of the mesh (fully_shard's default) so that each "
            "rank holds whole units: shard it so, or name it in exclude"
        )
    if (size := mesh_of(route.parameter).size()) != world_size():
        raise UnsupportedTrainingError(
            f"{route.name!r} is sharded over {size} of {world_size()} ranks; NeuRMS sums its "
            "statistics over all of them, so use one mesh of all ranks, or name it in exclude"
        )


def _tensors(pending: PendingSums) -> list[Tensor]:
    return [sums for sums in (pending.units, pending.features) if sums is not None]


def _are_finite(sums: Sums, activations: Tensor, layer: TappedLayer) -> bool:
    """Return whether D and H are finite: by their sums of squares, or H by itself without one."""
    rows = max(layer.pending.rows + sums.rows, 1)
    squares = [s for s in (sums.unit_square_sum, sums.feature_square_sum) if s is not None]
    looked_at = [(s, torch.finfo(s.dtype).max / (4.0 * rows)) for s in squares]
    if sums.feature_square_sum is None:
        # What is finite may round to an infinity, but not where its square is finite.
        dtype = torch.bfloat16 if layer.owner.gemm == "bfloat16" else activations.dtype
        looked_at.append((activations, torch.finfo(dtype).max))
    tensors, bounds = zip(*looked_at, strict=True)
    return within.on(layer.backend)(tensors, bounds)


def _is_compiled(module: nn.Module | None) -> bool:
    return module is not None and (
        getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
    )


def _warn(message: str) -> None:
    """Warn from where the user called us: schedulers and torch wrap an optimizer's step."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(("neurms.", "torch.")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)
