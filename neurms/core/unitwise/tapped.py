"""A layer under NeuRMS's rule: its tap's sink, its statistics, its scale factors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from neurms.compiled.reductions import column_square_sum
from neurms.core.ground.ranks import Ranks
from neurms.core.ground.spans import span, spanned, spanning
from neurms.core.routing import Route
from neurms.core.structures.base import Moments
from neurms.core.structures.unit_feature import UnitFeatureDiagonal
from neurms.core.taps.backward import BackwardUpdateTap
from neurms.core.taps.hooks import HookTap
from neurms.core.taps.products import fused_in
from neurms.core.taps.protocol import Sums
from neurms.core.unitwise.foresight import Foresight, foresee
from neurms.core.unitwise.rule import Gemm, LossReduction, UnitwiseRule
from neurms.core.unitwise.statistics import (
    AnyPart,
    Basis,
    Factors,
    PendingSums,
    by_unit,
    is_basis,
    moved,
    pooled,
    synchronize,
)

__all__ = ["Holder", "TappedLayer", "commit"]


class HasRules(Protocol):
    """Whoever an engine belongs to, as its layers know it."""

    def rule_of(self, weight: Tensor) -> UnitwiseRule:
        """Return what the current settings say of a weight."""

    def seat_of(self, weight: Tensor) -> tuple[UnitwiseRule, dict[str, Any]]:
        """Return a weight's rule and its state."""

    def state_of(self, parameter: Tensor) -> dict[str, Any]:
        """Return a parameter's state, empty before its first step."""


class Holder(Protocol):
    """What layers ask of the engine that holds them."""

    backend: str
    loss_reduction: LossReduction
    loss_scale: Callable[[], Tensor | float] | None
    gemm: Gemm

    @property
    def owner_ref(self) -> Callable[[], HasRules | None]:
        """Returns the owner while there is one."""

    @property
    def owner(self) -> HasRules:
        """The optimizer or preconditioner."""

    @property
    def ranks(self) -> Ranks:
        """The ranks over which statistics are summed."""

    def current_loss_scale(self) -> Tensor | float | None:
        """Return the factor that the loss carries, or None."""

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


class TappedLayer:
    """Statistics and factors of one layer; the sink of its tap.

    Args:
        route: The weight's route.
        bias: The layer's bias where the rule takes it too.
        engine: Holds the layer; held weakly, so that it goes when its user lets go of it.
        heads: Number of equal runs of units that share one second moment, their mean; 0 keeps one
            for each unit.
    """

    def __init__(self, route: Route, bias: Tensor | None, engine: Holder, heads: int = 0) -> None:
        self.route = route
        self.weight = route.parameter
        self.bias = bias
        self.heads = heads
        self.features = route.layout.features
        self.pending = PendingSums()
        self.tap: HookTap | BackwardUpdateTap | None = None
        self.follows_gradient = True
        self._engine = weakref.ref(engine)
        self.observed = self.pending
        """What the next commit takes: sums over all ranks once they are synchronised."""
        self.dirty = False
        """Whether there is something that :meth:`clear` forgets."""
        self._task: int | None = None
        self._version: int | None = None
        self._everywhere = self.pending
        self._rescaled: Sums | None = None
        self._seat: tuple[UnitwiseRule, dict[str, Any]] | None = None
        self.foresight: Foresight | None = None
        """What backward has worked out already of the next commit."""
        self.standing: tuple[Basis, Factors] | None = None
        """Factors of the last commit, and what they were made of."""
        self.settled = 0
        """Identity of the gradient in whose step that was."""

    @property
    def engine(self) -> Holder:
        """What holds the layer."""
        engine = self._engine()
        if engine is None:
            raise ReferenceError(f"the optimizer of layer {self.name!r} no longer exists")
        return engine

    @property
    def rule(self) -> UnitwiseRule:
        """What the current settings say of the layer."""
        engine = self._engine() or self.engine
        return (engine.owner_ref() or engine.owner).rule_of(self.weight)

    @property
    def state(self) -> dict[str, Any]:
        """The weight's state: empty before its first commit, then ``step``, ``v``, ``u``."""
        return self.engine.owner.state_of(self.weight)

    @property
    def backend(self) -> str:
        """How the layer's kernels run: natively too where they are small, beside large ones."""
        return self.engine.backend

    @property
    def name(self) -> str:
        """Qualified name of the weight."""
        return self.route.name

    @property
    def updated_in_backward(self) -> bool:
        """Whether the weight moves during backward and never has a gradient."""
        return self.tap is not None and not self.tap.leaves_gradient

    @property
    def sizes(self) -> tuple[int, int]:
        """(m, n) of the sums that the tap delivers, n = 0 where H is not observed."""
        observes = self.rule.structure.factored
        return self.route.layout.units, self.route.layout.features if observes else 0

    def new_state(self, like: Tensor) -> dict[str, Any]:
        """Return fresh state of the weight: a step count, v and u, on the device of ``like``."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        layout = self.route.layout
        shape = (self.heads or layout.units, layout.features)
        sizes = self.rule.structure.init(torch.empty(shape, dtype=dtype, device="meta"))
        made = {key: torch.zeros_like(value, device=like.device) for key, value in sizes.items()}
        return {"step": 0, **made}

    # ------------------------------------------------------------- what taps call

    def loss_scale(self) -> Tensor | float | None:
        """Return the factor that the loss carries; D is divided by it."""
        engine = self._engine() or self.engine
        return None if engine.loss_scale is None else engine.current_loss_scale()

    def add(self, sums: Sums) -> None:
        """Take one backward firing whose gradient accumulates into the weight."""
        self._follow_gradient()
        self.take(sums)

    def take(self, sums: Sums) -> None:
        """As :meth:`add`, of a firing whose gradient was looked after."""
        if not sums.rows and self.rule.upstream:
            # Nothing to rescale here, but ranks whose batch is not empty wait in their all-reduce.
            self._rescaled = self._summed_over_ranks(sums)
        # Where variant B has summed over ranks already, factors are made of those sums.
        if self._rescaled is not None or self._everywhere is not self.pending:
            self._everywhere = self._everywhere.plus(self._rescaled or sums)
        self.pending.add(sums)
        self._rescaled, self.observed, self.dirty = None, self.pending, True

    def rescale(self, sums: Sums) -> Tensor | None:
        """Return variant B's factors (units,) for D, from v with this pass blended in."""
        self._rescaled = None
        engine = self._engine() or self.engine
        if not (engine.owner_ref() or engine.owner).rule_of(self.weight).upstream:
            return None
        self._follow_gradient()
        self._rescaled, self.dirty = self._summed_over_ranks(sums), True
        s, _ = self.foreseen(self._rescaled)
        return s

    def rescale_errors(self, errors: Tensor) -> Tensor | None:
        """Return D S for variant B (``update="backward"``), else None."""
        # Asked once for this and for the update that follows.
        engine = self._engine() or self.engine
        self._seat = (engine.owner_ref() or engine.owner).seat_of(self.weight)
        if not self._seat[0].upstream:
            self._rescaled = None
            return None
        factors = self.rescale(self._unit_sums(errors))
        if factors is None:
            return None
        with span("scale", [self.weight]):
            return (errors * factors).to(errors.dtype)

    def update(self, errors: Tensor, activations: Tensor) -> Tensor | None:
        """Observe D and H and have the update written (``update="backward"``).

        Returns:
            The column sums of D where they came along, else None.
        """
        return spanning("bookkeeping", [self.weight], self._update, errors, activations)

    def _update(self, errors: Tensor, activations: Tensor) -> Tensor | None:
        self._follow_gradient()
        engine = self._engine() or self.engine
        seat, self._seat, self.dirty = self._seat, None, True
        rule, state = seat or (engine.owner_ref() or engine.owner).seat_of(self.weight)
        ahead = self._foresee(engine, rule, state, errors, activations)
        if ahead is None:
            sums = self._rescaled or self._unit_sums(errors)
            if rule.structure.factored:
                with span("reduce"):
                    features = column_square_sum.on(self.backend)(activations)
                rows = activations.shape[0]
                sums = sums._replace(feature_square_sum=features, feature_rows=rows)
            engine.write_in_backward(self, rule, state, errors, activations, sums)
            return None
        # A copy of the layer's signals must not outlive their use.
        foresight, scaled = ahead
        self.foresight = foresight
        engine.write_in_backward(self, rule, state, errors, activations, foresight.sums, scaled)
        return foresight.error_sum

    def _foresee(
        self,
        engine: Holder,
        rule: UnitwiseRule,
        state: Mapping[str, Any],
        errors: Tensor,
        activations: Tensor,
    ) -> tuple[Foresight, tuple[Tensor, Tensor] | None] | None:
        """Work everything out in one pass over D and H, where nothing else has a say in it."""
        seen = self._everywhere.rows or self._rescaled is not None
        if self.heads or seen or rule.upstream or not state:
            return None
        return foresee(
            errors, activations, rule.structure, state, engine.loss_reduction, engine.backend,
            scale=fused_in(engine.gemm, errors, activations) is None,
        )  # fmt: skip

    def _follow_gradient(self) -> None:
        """At a backward's first firing, drop sums whose gradient was dropped without a step.

        That happens after a GradScaler's overflow or a bad step, by ``model.zero_grad()``: the
        gradient is None then, or zero.
        """
        task, gradient = torch._C._current_graph_task_id(), self.weight.grad
        if task == self._task or not self.follows_gradient:
            return
        self._task = task
        if gradient is None:
            self._version = None
            if self.dirty:
                self.clear()
            return
        # Accumulation itself counts one version up. Only where something else has written are the
        # values looked at, which an accelerator would have to wait for.
        expected = 0 if self._version is None else self._version + 1
        self._version = gradient._version
        if self._version != expected and self.pending.rows and not bool(gradient.any()):
            self.clear()

    @spanned("reduce")
    def _unit_sums(self, errors: Tensor) -> Sums:
        return Sums(column_square_sum.on(self.backend)(errors), errors.shape[0])

    def _summed_over_ranks(self, sums: Sums) -> Sums:
        total = PendingSums()
        total.add(sums)
        sizes, engine = [(self.route.layout.units, 0)], self.engine
        synchronize([total], sizes, engine.loss_reduction, self.weight, engine.ranks)
        assert total.units is not None
        return sums._replace(unit_square_sum=total.units.to(sums.unit_square_sum), rows=total.rows)

    # ------------------------------------------------------------- statistics and factors

    def begin_synchronization(self) -> PendingSums:
        """Return a copy of the pending sums, to be summed over ranks in place."""
        self.observed, self.dirty = self.pending.copy(), True
        return self.observed

    def restore(self, pending: PendingSums) -> None:
        """Make ``pending`` what the layer has seen since the last commit."""
        self.clear()
        self.pending = self.observed = self._everywhere = pending.copy()
        self.dirty = True

    def clear(self) -> None:
        """Forget what was observed since the last commit."""
        # All in one call: a step makes it for every layer.
        pending = self.pending
        pending.units = pending.features = None
        pending.rows = pending.feature_rows = 0
        self.observed = self._everywhere = pending
        self._rescaled = self.foresight = self._seat = None
        self.dirty = False

    def moments(self, pending: PendingSums) -> Moments:
        """Return the mean squares of ``pending``, heads pooled."""
        seen = pending.moments(self.engine.loss_reduction)
        if not self.heads or seen.units is None:
            return seen
        return Moments(pooled(seen.units, self.heads), seen.features)

    @spanned("bookkeeping")
    def foreseen(self, sums: Sums) -> Factors:
        """Return the factors as they would be if ``sums`` were committed now; nothing changes."""
        if self.foresight is not None and self.foresight.sums is sums:
            return self.foresight.factors
        everywhere, features = self._everywhere.plus(sums), self.route.layout.features
        part = (self.state, everywhere, features, self.heads)
        engine = self.engine
        ahead = moved(self.rule.structure, [part], engine.loss_reduction, engine.backend)
        return ahead.s[0], ahead.c[0]

    @property
    def stands_still(self) -> bool:
        """Whether the weight has a gradient of which nothing was seen, and nothing committed."""
        return not self.observed.rows and self.settled != id(self.weight.grad)

    def factors(self) -> Factors:
        """Return s (m,) and c (n,) from the committed statistics; c is None unless factored."""
        return self.factors_of(self.rule.structure, self.state)

    @spanned("bookkeeping")
    def factors_of(self, structure: UnitFeatureDiagonal, state: dict[str, Any]) -> Factors:
        """As :meth:`factors`, of the layer's settings and state where those are at hand."""
        if self.standing is not None and is_basis(self.standing[0], structure, state):
            return self.standing[1]
        with span("scale"):
            s, c = structure.factors(state, state["step"])
            return by_unit(s, self.route.layout.units, self.heads), c


Seat = tuple[TappedLayer, dict[str, Any]]
"""A layer and its state."""


def commit(
    structure: UnitFeatureDiagonal, seats: Sequence[Seat], reduction: LossReduction, backend: str
) -> None:
    """Move what layers have observed into their state, all in one call.

    Args:
        structure: The settings, the same for all.
        seats: Layers that have seen rows of D, each with its state.
        reduction: How the loss reduces over rows.
        backend: How kernels run.
    """
    kept: list[Tensor] = []
    fresh: list[Tensor] = []
    settled: list[tuple[TappedLayer, dict[str, Any], Factors]] = []
    rest: list[Seat] = []
    for layer, state in seats:
        ahead = layer.foresight
        if ahead is None or not ahead.holds(structure, state, layer.observed):
            rest += ((layer, state),)
            continue
        kept += (state["v"], state["u"]) if structure.factored else (state["v"],)
        fresh += ahead.moments
        settled += ((layer, state, ahead.factors),)
    parts: list[AnyPart] = [
        (state, layer.observed, layer.features, layer.heads) for layer, state in rest
    ]
    v, u, s, c = moved(structure, parts, reduction, backend)
    kept += [state["v"] for _, state in rest]
    fresh += v
    if structure.factored:
        kept += [state["u"] for _, state in rest]
        fresh += [own for own in u if own is not None]
    with span("reduce"):
        torch._foreach_copy_(kept, fresh)
    settled += [(*seat, own) for seat, own in zip(rest, zip(s, c, strict=True), strict=True)]
    for layer, state, factors in settled:
        step = state["step"] = state["step"] + 1
        now, other = state["v"], state["u"] if "u" in state else None
        version = 0 if other is None else other._version
        layer.standing = (structure, step, now, now._version, other, version), factors
        layer.settled = id(layer.weight.grad)
        layer.clear()
