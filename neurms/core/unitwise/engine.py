"""NeuRMS beneath its optimizer: tapped layers, what they have seen, the verdict, the commit.

One object for :class:`~neurms.core.unitwise.neurms.NeuRMS`, whose factors reach weights, and for
:class:`~neurms.core.unitwise.preconditioner.GradientPreconditioner`, whose factors reach gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from neurms.compiled.backends import PROMPT, use_backend
from neurms.compiled.finite import are_small, within
from neurms.compiled.native import LEAST_ELEMENTS
from neurms.core.ground.errors import UnsupportedTrainingError
from neurms.core.ground.ranks import ALONE, Ranks, ranks_of, world_size
from neurms.core.ground.spans import is_observed, span, spanning
from neurms.core.ground.warn import warn_user
from neurms.core.optimizers.settings import NonFinite
from neurms.core.routing import Route, RoutedModel
from neurms.core.structures.unit_feature import UnitFeatureDiagonal
from neurms.core.taps.backward import BackwardUpdateTap
from neurms.core.taps.hooks import HookTap, removed_taps
from neurms.core.taps.products import Product
from neurms.core.taps.protocol import Sums
from neurms.core.taps.tap_set import TapSet, has_own_linear
from neurms.core.unitwise.layers import Heads, check_rows, pairs
from neurms.core.unitwise.rule import Gemm, LossReduction, UnitwiseRule
from neurms.core.unitwise.statistics import GREATEST, Factors, synchronize
from neurms.core.unitwise.tapped import Seat, TappedLayer, commit

__all__ = ["Engine", "Owner"]


class Owner(Protocol):
    """What differs between the users of an engine: settings, state, and where factors go."""

    nonfinite: NonFinite
    backend: str

    def rule_of(self, weight: Tensor) -> UnitwiseRule:
        """Return what the current settings say of a weight."""

    def seat_of(self, weight: Tensor) -> tuple[UnitwiseRule, dict[str, Any]]:
        """Return a weight's rule and its state."""

    def state_of(self, parameter: Tensor) -> dict[str, Any]:
        """Return a parameter's state, empty before its first step."""

    def opened_state(self, parameter: Tensor) -> dict[str, Any]:
        """Return a parameter's state, made if it is not there, with a velocity where one is due."""

    def write_in_backward(
        self,
        layer: TappedLayer,
        rule: UnitwiseRule,
        state: dict[str, Any],
        product: Product,
        factors: Factors,
    ) -> None:
        """Write the update of a layer whose weight has no gradient."""


class Engine(TapSet[TappedLayer, Owner]):
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
        super().__init__(owner)
        self.loss_reduction: LossReduction = loss_reduction
        self.gemm: Gemm = gemm
        self.loss_scale = loss_scale
        self.backend = backend
        self.process_group = process_group
        self.in_backward = False
        self._heads = Heads(heads)
        self._ranks: Ranks | None = None
        self._stood_still: set[str] = set()
        self._changed: set[str] = set()

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
        model: nn.Module,
        in_backward: bool = False,
        guarded: Iterable[Tensor] = (),
    ) -> None:
        """Make a layer of each weight among ``routes`` and put its tap in place, all or none.

        Args:
            routes: Weights and biases under the rule.
            model: Holds the layers; if it is compiled, it is traced anew so that taps are seen.
            in_backward: Whether linear layers are updated during backward.
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
        for route, _ in own:
            check_rows(route)
        layers = [TappedLayer(route, bias, self, self._heads.of(route)) for route, bias in own]
        self.hold(layers, model, guarded if in_backward else ())
        large = any(layer.weight.numel() >= LEAST_ELEMENTS for layer in self)
        if large and self.backend == "auto":
            # Where there are large layers, small ones may as well run natively.
            self.backend = PROMPT
        brought = model.tap_for if isinstance(model, RoutedModel) else None
        for layer in self:
            layer.tap = (brought or self._tap_for)(layer)
        if brought is None:
            self.put()

    def _tap_for(self, layer: TappedLayer) -> HookTap | BackwardUpdateTap:
        module, rule = layer.route.module, layer.rule
        assert module is not None
        if self.in_backward and has_own_linear(layer.route):
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

    def follow(self, old: Route, new: Route) -> None:
        """Have a layer's tap follow its weight, or its bias, to the parameter in its place."""
        for layer in self:
            if layer.bias is old.parameter:
                layer.bias = new.parameter
        check_rows(new)
        if (followed := self.replace(old, new)) is not None:
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

    def prepare(self, layers: Sequence[TappedLayer], moving: Collection[int]) -> None:
        """Sum the statistics of layers over ranks, and refuse what a step must not take.

        Args:
            layers: Layers of this step.
            moving: Identities of the parameters that have a gradient in it: a tensor's own hash
                is a call of Python's.

        Raises:
            UnsupportedTrainingError: A tap was removed; or gradients were changed, or a weight used
                outside its layer, where ``update="backward"`` cannot see it.
        """
        self.check_use(layers, moving)
        removed = removed_taps([layer.tap for layer in layers])
        for layer in layers if removed else ():
            if layer.tap in removed and id(layer.weight) in moving:
                raise UnsupportedTrainingError(
                    f"the tap of layer {layer.name!r} was removed from its module (were its "
                    "forward hooks cleared?), so its error signal is no longer seen; keep the "
                    "hooks, build the optimizer anew, or detach() it to go on with the statistics "
                    "it has"
                )
        self.synchronize(layers)

    def _warn_of_changes(self, layers: Iterable[TappedLayer]) -> None:
        for layer in layers:
            tap = layer.tap
            if tap is None or not tap.changed or layer.name in self._changed:
                continue
            self._changed.add(layer.name)
            warn_user(
                f"layer {layer.name!r} {tap.changed} since the optimizer was built: its statistics "
                "are those of its product with the weight that is made now, and its gradient may "
                "be that of something else; build the optimizer anew, or name the layer in exclude"
            )

    def warn_of_still(self, layers: Sequence[TappedLayer], moving: Collection[int]) -> None:
        """Warn, once for each layer, of statistics that stand still while training goes on."""
        self._warn_of_changes(layers)
        for layer in [layer for layer in layers if not layer.observed.rows]:
            if id(layer.weight) not in moving or not layer.stands_still:
                continue
            if not layer.state.get("step"):
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
        if self._bad:
            # What backward has left out makes any look fail.
            return [torch.ones(1, device="cpu")], [0.0]
        seen = [layer.observed for layer in self._unjudged()]
        own = [x for x in seen if x.features is None]
        tensors: list[Any] = [x.units for x in own]
        bounds = [
            GREATEST[x.units.dtype] / (4.0 * (x.rows or 1)) for x in own if x.units is not None
        ]
        for sums in seen if len(own) < len(seen) else ():
            if sums.features is not None:
                tensors += sums.units, sums.features
                bounds += [sums.greatest()] * 2
        return tensors, bounds

    def bad_names(self) -> list[str]:
        """Return the layers whose observed statistics hold a NaN or an infinity."""
        bad = [layer.name for layer in self._unjudged() if not layer.observed.is_finite()]
        return self._bad + bad

    def _unjudged(self) -> list[TappedLayer]:
        """Return layers with statistics, but for those that backward has looked at."""
        seen = self._updated if self._updated and self.ranks.size == 1 else ()
        own = [x for x in self._layers.values() if x.observed.units is not None]
        return [x for x in own if x.route.name not in seen] if seen else own

    # ------------------------------------------------------------- commit and write

    def commit(self, layers: Iterable[TappedLayer]) -> None:
        """Move what layers have observed into their state, all in one call."""
        owner = self.owner
        self.commit_seats([(x.rule.structure, x, owner.opened_state(x.weight)) for x in layers])

    @torch.no_grad()
    def commit_seats(
        self, seats: Iterable[tuple[UnitFeatureDiagonal, TappedLayer, dict[str, Any]]]
    ) -> None:
        """As :meth:`commit`, of layers whose settings and state are at hand."""
        alike: dict[int, tuple[UnitFeatureDiagonal, list[Seat]]] = {}
        last: UnitFeatureDiagonal | None = None
        own: list[Seat] = []
        for structure, layer, state in seats:
            if structure is not last:
                last, (_, own) = structure, alike.setdefault(id(structure), (structure, []))
            own += ((layer, state),)
        for structure, together in alike.values():
            # Who measures wants each layer's time.
            for part in [[one] for one in together] if is_observed() else [together]:
                with span("bookkeeping", [layer.weight for layer, _ in part]):
                    commit(structure, part, self.loss_reduction, self.backend)

    def write_in_backward(
        self,
        layer: TappedLayer,
        rule: UnitwiseRule,
        state: dict[str, Any],
        errors: Tensor,
        activations: Tensor,
        sums: Sums,
        scaled: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Have a layer's update written if its D and H are finite."""
        if not self.judges(layer, self._are_good(layer, sums, activations)):
            return
        owner = self.owner_ref() or self.owner
        if not state or rule.momentum or rule.normalize:
            state = owner.opened_state(layer.weight)
        ahead = layer.foresight
        if ahead is not None and ahead.sums is sums:
            factors = ahead.factors
        else:
            factors = layer.foreseen(sums)
        layer.take(sums)
        product = Product(errors, activations, scaled, self.gemm, self.backend)
        write = owner.write_in_backward
        given = layer, rule, state, product, factors
        if not (rule.momentum or rule.normalize):
            spanning("update", [layer.weight], write, *given)
            return
        # Which form a velocity's kernels take is for the context to say.
        with torch.no_grad(), use_backend(owner.backend), span("update", [layer.weight]):
            write(*given)

    def _are_good(self, layer: TappedLayer, sums: Sums, activations: Tensor) -> bool:
        """Return whether D and H are finite: told by their sums of squares, or by H without one."""
        units, features = sums.unit_square_sum, sums.feature_square_sum
        room = 4.0 * max(layer.pending.rows + sums.rows, 1)
        seen, bounds = [units], [GREATEST[units.dtype] / room]
        if features is not None:
            seen, bounds = [units, features], [*bounds, GREATEST[features.dtype] / room]
        else:
            # What is finite may round to an infinity, but not where its square is finite.
            dtype = torch.bfloat16 if self.gemm == "bfloat16" else activations.dtype
            seen, bounds = [units, activations], [*bounds, torch.finfo(dtype).max]
        return are_small(seen, bounds) or within(seen, bounds)

    def unseen(self) -> list[TappedLayer]:
        """Return layers of which no rank has ever seen an error signal."""
        return [x for x in self._layers.values() if not x.observed.rows and not x.state]
