"""NeuRMS beneath its optimizer: tapped layers, what they have seen, the verdict, the commit.

One object for :class:`~neurms.core.unitwise.neurms.NeuRMS`, whose factors reach weights, and for
:class:`~neurms.core.unitwise.preconditioner.GradientPreconditioner`, whose factors reach gradients.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from neurms.compiled.backends import PROMPT, use_backend
from neurms.compiled.finite import within
from neurms.compiled.native import LEAST_ELEMENTS
from neurms.core.ground.errors import NonFiniteError, UnsupportedTrainingError
from neurms.core.ground.ranks import ALONE, Ranks, ranks_of, world_size
from neurms.core.ground.spans import is_observed, span
from neurms.core.ground.warn import warn_user
from neurms.core.optimizers.settings import NonFinite
from neurms.core.routing import Route, RoutedModel
from neurms.core.taps.backward import BackwardUpdateTap, is_tapped_linear
from neurms.core.taps.guard import GradientGuard
from neurms.core.taps.hooks import HookTap, forget_compiled_graphs
from neurms.core.taps.protocol import Sums
from neurms.core.unitwise.layers import Heads, check_rows, is_compiled, pairs
from neurms.core.unitwise.moments import Factors, Moved, moved
from neurms.core.unitwise.products import Product
from neurms.core.unitwise.rule import Gemm, LossReduction, UnitwiseRule
from neurms.core.unitwise.statistics import PendingSums, synchronize
from neurms.core.unitwise.tapped import TappedLayer

__all__ = ["Engine", "Owner"]


class Owner(Protocol):
    """What differs between the users of an engine: settings, state, and where factors go."""

    nonfinite: NonFinite
    backend: str

    def rule_of(self, weight: Tensor) -> UnitwiseRule:
        """Return what the current settings say of a weight."""

    def state_of(self, parameter: Tensor) -> dict[str, Any]:
        """Return a parameter's state, empty before its first step."""

    def opened_state(self, parameter: Tensor) -> dict[str, Any]:
        """Return a parameter's state, made if it is not there, with a velocity where one is due."""

    def write_in_backward(self, layer: TappedLayer, product: Product, factors: Factors) -> None:
        """Write the update of a layer whose weight has no gradient."""


class Engine:
    """The tapped layers of a model, with their statistics and what is made of them.

    Args:
        owner: The optimizer or preconditioner; held weakly.
        loss_reduction: How the loss reduces over rows.
        gemm: What ``update="backward"`` multiplies in.
        loss_scale: Returns the factor that the loss carries, or None.
        heads: Name pattern of weights -> number of heads that share second moments.
        backend: How kernels run.
        process_group: The ranks that train the model together; None finds them.
    """

    def __init__(
        self,
        owner: Owner,
        *,
        loss_reduction: LossReduction,
        gemm: Gemm,
        loss_scale: Callable[[], Tensor | float] | None,
        heads: Mapping[str, int] | None,
        backend: str,
        process_group: Any = None,
    ) -> None:
        self._owner = weakref.ref(owner)
        self.loss_reduction: LossReduction = loss_reduction
        self.gemm: Gemm = gemm
        self.loss_scale = loss_scale
        self.backend = backend
        self.process_group = process_group
        self.in_backward = False
        self._heads = Heads(heads)
        self._guard: GradientGuard | None = None
        self._guarded: list[Tensor] = []
        self._compiled = False
        self._ranks: Ranks | None = None
        self._layers: dict[Tensor, TappedLayer] = {}
        self._bad: list[str] = []
        self._updated: list[str] = []
        self._stood_still: set[str] = set()
        self._changed: set[str] = set()

    @property
    def owner(self) -> Owner:
        """The optimizer or preconditioner."""
        owner = self._owner()
        if owner is None:
            raise ReferenceError("the optimizer of these layers no longer exists")
        return owner

    def rule_of(self, weight: Tensor) -> UnitwiseRule:
        """Return what the current settings say of a weight."""
        return self.owner.rule_of(weight)

    def state_of(self, parameter: Tensor) -> dict[str, Any]:
        """Return a parameter's state, empty before its first step."""
        return self.owner.state_of(parameter)

    def __iter__(self) -> Iterator[TappedLayer]:
        return iter(self._layers.values())

    def of(self, weight: Tensor) -> TappedLayer | None:
        """Return the layer of a weight, or None."""
        return self._layers.get(weight)

    @property
    def ranks(self) -> Ranks:
        """The ranks over which statistics are summed."""
        if world_size() == 1:
            return ALONE
        if self._ranks is None:
            self._ranks = self._found_ranks()
        return self._ranks

    def _found_ranks(self) -> Ranks:
        if self.process_group is not None:
            return Ranks.of_group(self.process_group)
        found = ranks_of(self._layers)
        if found is None:
            warn_user(
                f"{world_size()} ranks run, and neither DistributedDataParallel nor fully_shard "
                "holds this model: statistics of layers are those of each rank alone, as models "
                "that differ from rank to rank need them. If all ranks train one model, pass "
                "process_group=torch.distributed.group.WORLD"
            )
        return found or ALONE

    # ------------------------------------------------------------- taps

    def attach(
        self,
        routes: Iterable[Route],
        *,
        in_backward: bool = False,
        model: nn.Module | None = None,
        guarded: Iterable[Tensor] = (),
    ) -> None:
        """Make a layer of each weight among ``routes`` and put its tap in place, all or none.

        Args:
            routes: Weights and biases under the rule.
            in_backward: Whether linear layers are updated during backward.
            model: Holds the layers; if it is compiled, it is traced anew so that taps are seen.
            guarded: Parameters whose gradients nobody may change with ``in_backward``.

        Raises:
            ValueError: A pattern of ``heads`` matches no weight, or does not divide its outputs; a
                weight is tapped in another module.
            UnsupportedTrainingError: Several ranks train and ``in_backward`` is set, or a weight is
                sharded otherwise than by its units.
        """
        self.in_backward = in_backward
        own = pairs(routes)
        self._heads.check([route for route, _ in own])
        for route, bias in own:
            check_rows(route)
            heads = self._heads.of(route)
            self._layers[route.parameter] = TappedLayer(route, bias, self, heads)
        modules = [layer.route.module for layer in self] if model is None else model.modules()
        self._compiled = any(map(is_compiled, modules))
        large = any(layer.weight.numel() >= LEAST_ELEMENTS for layer in self)
        if large and self.backend == "auto":
            # Where there are large layers, small ones may as well run natively.
            self.backend = PROMPT
        self._guarded = list(guarded) if in_backward else []
        brought = model.tap_for if isinstance(model, RoutedModel) else None
        for layer in self:
            layer.tap = (brought or self._tap_for)(layer)
        if brought is None:
            self.attach_taps()

    def _tap_for(self, layer: TappedLayer) -> HookTap | BackwardUpdateTap:
        module, rule = layer.route.module, layer.rule
        assert module is not None
        # A subclass may be one that a dead optimizer's tap has left behind.
        linear = type(module) is nn.Linear or is_tapped_linear(module)
        if self.in_backward and linear and module._parameters.get("weight") is layer.weight:
            assert isinstance(module, nn.Linear)
            return BackwardUpdateTap(module, layer, name=layer.name)
        return HookTap(
            module,
            layer.weight,
            layer,
            features=rule.structure.factored,
            backend=layer.backend,
            in_graph="rescale" if rule.upstream else "observe",
        )

    def attach_taps(self) -> None:
        """Put all taps in place, or none."""
        try:
            for layer in self:
                if layer.tap is not None:
                    layer.tap.attach()
        except BaseException:
            self.detach()
            raise
        if self._compiled:
            forget_compiled_graphs()
        without = {layer.weight for layer in self if layer.updated_in_backward}
        if without and self._guard is None:
            self._guard = GradientGuard(p for p in self._guarded if p not in without)

    def detach(self) -> None:
        """Remove every tap; layers go on with the statistics that they have."""
        for layer in self:
            if layer.tap is not None:
                layer.tap.detach()
        if self._compiled:
            forget_compiled_graphs()
        if self._guard is not None:
            self._guard.detach()
            self._guard = None

    def remove(self, layer: TappedLayer) -> None:
        """Take a layer out and its tap off."""
        del self._layers[layer.weight]
        if layer.tap is not None:
            layer.tap.detach()

    def follow(self, old: Route, new: Route) -> None:
        """Have a layer's tap follow its weight, or its bias, to the parameter in its place."""
        for layer in self:
            if layer.bias is old.parameter:
                layer.bias = new.parameter
        followed = self._layers.pop(old.parameter, None)
        if followed is not None:
            if followed.tap is not None:
                followed.tap.detach()
            check_rows(new)
            followed.route, followed.weight = new, new.parameter
            self._layers[new.parameter] = followed
            followed.tap = self._tap_for(followed)
            followed.tap.attach()

    # ------------------------------------------------------------- pending statistics

    def current_loss_scale(self) -> Tensor | float | None:
        """Return what ``loss_scale`` returns, or None."""
        if self.loss_scale is None:
            return None
        scale = self.loss_scale()
        # A tensor is not looked into: that would wait for the device in every layer's backward.
        if not isinstance(scale, Tensor) and not 0 < scale < math.inf:
            raise ValueError(f"loss_scale() returned {scale!r}; it must be positive and finite")
        return scale

    def clear(self) -> None:
        """Drop pending statistics and let backward updates begin anew."""
        self._bad.clear()
        self._updated.clear()
        for layer in self:
            layer.clear()
            if isinstance(layer.tap, BackwardUpdateTap):
                layer.tap.rearm()

    def forget(self) -> None:
        """Drop pending statistics along with gradients."""
        self.clear()
        if self._guard is not None:
            self._guard.forget()

    def synchronize(self, layers: Sequence[TappedLayer]) -> None:
        """Sum pending statistics over ranks: from here on they are each layer's ``observed``."""
        if not layers or (ranks := self.ranks).size == 1:
            return
        with span("reduce", [layer.weight for layer in layers]):
            synchronize(
                [layer.begin_synchronization() for layer in layers],
                [layer.sizes for layer in layers],
                self.loss_reduction,
                layers[0].weight,
                ranks,
            )

    # ------------------------------------------------------------- the verdict

    def prepare(self, layers: Sequence[TappedLayer], moving: Collection[Tensor]) -> None:
        """Sum the statistics of layers over ranks, and refuse what a step must not take.

        Args:
            layers: Layers of this step.
            moving: Parameters that have a gradient in it.

        Raises:
            UnsupportedTrainingError: A tap was removed; or gradients were changed, or a weight used
                outside its layer, where ``update="backward"`` cannot see it.
        """
        if self._guard is not None:
            self._guard.check()
        for layer in layers:
            tap = layer.tap
            if layer.weight in moving and layer.updated_in_backward and layer.pending.rows:
                raise UnsupportedTrainingError(
                    f"weight {layer.name!r} was updated during backward and has a gradient too: it "
                    'is used outside its layer, which update="backward" cannot see; use '
                    'update="step"'
                )
            if layer.weight in moving and isinstance(tap, HookTap) and tap.removed:
                raise UnsupportedTrainingError(
                    f"the tap of layer {layer.name!r} was removed from its module (were its "
                    "forward hooks cleared?), so its error signal is no longer seen; keep the "
                    "hooks, build the optimizer anew, or detach() it to go on with the statistics "
                    "it has"
                )
        self.synchronize(layers)

    def _warn_of_changes(self, layers: Iterable[TappedLayer]) -> None:
        for layer in layers:
            change = layer.tap.changed if isinstance(layer.tap, HookTap) else ""
            if not change or layer.name in self._changed:
                continue
            self._changed.add(layer.name)
            warn_user(
                f"layer {layer.name!r} {change} since the optimizer was built: its statistics are "
                "those of its product with the weight that is made now, and its gradient may be "
                "that of something else; build the optimizer anew, or name the layer in exclude"
            )

    def warn_of_still(self, layers: Iterable[TappedLayer], moving: Collection[Tensor]) -> None:
        """Warn, once for each layer, of statistics that stand still while training goes on."""
        self._warn_of_changes(layers)
        for layer in layers:
            if layer.weight not in moving or not layer.stands_still or not layer.state.get("step"):
                continue
            if layer.tap is None or not layer.tap.attached or layer.name in self._stood_still:
                continue
            self._stood_still.add(layer.name)
            warn_user(
                f"layer {layer.name!r} has a gradient in this step but no error signal of it was "
                "seen, so its statistics stand still; call the module itself, or build the "
                "optimizer anew if the layer was changed"
            )

    def look_at(self) -> tuple[list[Tensor], list[float]]:
        """Return the statistics that nobody has judged yet, and what each may be at most."""
        observed = [layer.observed for layer in self._unjudged()]
        sums = [(own, pending.greatest()) for pending in observed for own in _tensors(pending)]
        tensors, bounds = [own for own, _ in sums], [bound for _, bound in sums]
        # What backward has left out makes any look fail.
        return (tensors, bounds) if not self._bad else ([torch.ones(1, device="cpu")], [0.0])

    def bad_names(self) -> list[str]:
        """Return the layers whose observed statistics hold a NaN or an infinity."""
        bad = [layer.name for layer in self._unjudged() if not layer.observed.is_finite()]
        return self._bad + bad

    def _unjudged(self) -> list[TappedLayer]:
        """Return layers with statistics, but for those that backward has looked at."""
        seen = set(self._updated) if self._updated and self.ranks.size == 1 else ()
        return [x for x in self if x.observed.units is not None and x.name not in seen]

    @property
    def updated(self) -> list[str]:
        """Names of the layers that backward has updated since the last step."""
        return list(self._updated)

    # ------------------------------------------------------------- commit and write

    @torch.no_grad()
    def commit(self, layers: Iterable[TappedLayer]) -> None:
        """Move what layers have observed into their state, all in one call."""
        alike: dict[Any, list[TappedLayer]] = {}
        for layer in layers:
            self.owner.opened_state(layer.weight)
            alike.setdefault((layer.rule.structure, layer.backend), []).append(layer)
        for own in alike.values():
            # Who measures wants each layer's time.
            for part in [[one] for one in own] if is_observed() else [own]:
                with span("bookkeeping", [layer.weight for layer in part]):
                    self._commit(part)

    def _commit(self, layers: Sequence[TappedLayer]) -> None:
        known = [layer.known() for layer in layers]
        rest = [layer for layer, own in zip(layers, known, strict=True) if own is None]
        parts = [layer.part(layer.observed) for layer in rest]
        fresh = iter(moved(layers[0].rule.structure, parts, layers[0].backend))
        results: list[Moved] = [next(fresh) if own is None else own for own in known]
        states = [layer.state for layer in layers]
        with span("reduce"):
            kept = [s[key] for s in states for key in ("v", "u") if key in s]
            torch._foreach_copy_(kept, [x for own in results for x in own.moments])
        for layer, state, own in zip(layers, states, results, strict=True):
            state["step"] += 1
            layer.settle(own.factors)

    def write_in_backward(
        self, layer: TappedLayer, errors: Tensor, activations: Tensor, sums: Sums
    ) -> None:
        """Have a layer's update written if its D and H are finite."""
        if not self._accepts(layer, sums, activations):
            return
        owner = self.owner
        owner.opened_state(layer.weight)
        factors = layer.foreseen(sums)
        layer.add(sums)
        product = Product(errors, activations, layer.scaled, self.gemm, layer.backend)
        with torch.no_grad(), use_backend(self.owner.backend), span("update", [layer.weight]):
            owner.write_in_backward(layer, product, factors)

    def _accepts(self, layer: TappedLayer, sums: Sums, activations: Tensor) -> bool:
        """Return whether a backward update may be written.

        Raises:
            NonFiniteError: D or H is not finite and ``nonfinite`` is ``"raise"``; names what was
                updated before.
        """
        if within(*_seen_of(layer, sums, activations)):
            self._updated.append(layer.name)
            return True
        if self.owner.nonfinite == "skip":
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

    def unseen(self) -> Iterator[TappedLayer]:
        """Yield layers of which no rank has ever seen an error signal."""
        for layer in self:
            if not layer.observed.rows and not layer.state:
                yield layer


def _tensors(pending: PendingSums) -> list[Tensor]:
    return [sums for sums in (pending.units, pending.features) if sums is not None]


def _seen_of(
    layer: TappedLayer, sums: Sums, activations: Tensor
) -> tuple[list[Tensor], list[float]]:
    """Return what shows whether D and H are finite: their sums of squares, or H without one."""
    rows = max(layer.pending.rows + sums.rows, 1)
    squares = [s for s in (sums.unit_square_sum, sums.feature_square_sum) if s is not None]
    bounds = [torch.finfo(s.dtype).max / (4.0 * rows) for s in squares]
    if sums.feature_square_sum is not None:
        return squares, bounds
    # What is finite may round to an infinity, but not where its square is finite.
    dtype = torch.bfloat16 if layer.engine.gemm == "bfloat16" else activations.dtype
    return [*squares, activations], [*bounds, torch.finfo(dtype).max]
