"""A layer under NeuRMS's rule: its tap's sink, its statistics, its scale factors."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from neurms.compiled.backends import PROMPT
from neurms.compiled.moments import ema_
from neurms.compiled.native import fits
from neurms.compiled.reductions import column_square_sum
from neurms.core.ground.spans import span, spanned
from neurms.core.routing import Route
from neurms.core.structures.base import Context, Moments
from neurms.core.structures.unit_feature import UnitFeatureDiagonal
from neurms.core.taps.accumulation import graph_task
from neurms.core.taps.backward import BackwardUpdateTap
from neurms.core.taps.hooks import HookTap
from neurms.core.taps.protocol import Sums
from neurms.core.unitwise.foresight import Foresight, KnownFactors, commit_, foresee
from neurms.core.unitwise.statistics import LossReduction, PendingSums, synchronize

__all__ = ["Gemm", "LayerOwner", "TappedLayer", "Variant"]

Variant = Literal["U", "B", "F"]
Gemm = Literal["float32", "bfloat16"]
"""What D and H are multiplied in where no gradient is formed."""


class LayerOwner(Protocol):
    """What holds layers: the optimizer, or a callback beside a foreign one."""

    backend: str
    loss_reduction: LossReduction
    gemm: Gemm

    def structure_of(self, layer: TappedLayer) -> UnitFeatureDiagonal:
        """Return the structure that the layer's current settings make."""

    def variant_of(self, layer: TappedLayer) -> Variant:
        """Return where the scale factors act."""

    def state_of(self, layer: TappedLayer) -> dict[str, Any]:
        """Return the layer's state: empty before its first commit, then ``step``, ``v``, ``u``."""

    def current_loss_scale(self) -> Tensor | float | None:
        """Return the factor that the loss carries, or None."""

    def write_in_backward(
        self, layer: TappedLayer, errors: Tensor, activations: Tensor, sums: Sums
    ) -> None:
        """Write the update of a layer whose weight has no gradient (``update="backward"``)."""


class TappedLayer:
    """Statistics and factors of one layer; the sink of its tap.

    Args:
        route: The weight's route.
        bias: The layer's bias where the rule takes it too.
        owner: Holds state and settings; held weakly, so that it goes when its user lets go of it.
        heads: Number of equal runs of units that share one second moment, their mean; 0 keeps one
            for each unit.
    """

    def __init__(
        self, route: Route, bias: Tensor | None, owner: LayerOwner, heads: int = 0
    ) -> None:
        self.route = route
        self.weight = route.parameter
        self.bias = bias
        self.heads = heads
        self.pending = PendingSums()
        self.tap: HookTap | BackwardUpdateTap | None = None
        self.prompt = False
        self._owner = weakref.ref(owner)
        self._total: PendingSums | None = None
        self._task: int | None = None
        self._version: int | None = None
        self._everywhere = PendingSums()
        self._rescaled: Sums | None = None
        self._foresight: Foresight | None = None
        self._known: KnownFactors | None = None

    @property
    def owner(self) -> LayerOwner:
        """What holds state and settings."""
        owner = self._owner()
        if owner is None:
            raise ReferenceError(f"the optimizer of layer {self.name!r} no longer exists")
        return owner

    @property
    def backend(self) -> str:
        """How the layer's kernels run: natively too where they are small, beside large ones."""
        backend = self.owner.backend
        return PROMPT if self.prompt and backend == "auto" else backend

    @property
    def name(self) -> str:
        """Qualified name of the weight."""
        return self.route.name

    @property
    def updated_in_backward(self) -> bool:
        """Whether the weight moves during backward and never has a gradient."""
        return isinstance(self.tap, BackwardUpdateTap)

    @property
    def sizes(self) -> tuple[int, int]:
        """(m, n) of the sums that the tap delivers, n = 0 where H is not observed."""
        observes = self.owner.structure_of(self).factored
        return self.route.layout.units, self.route.layout.features if observes else 0

    def state_matrix(self, like: Tensor) -> Tensor:
        """Return an empty (units, features) matrix without storage, to size the state on."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        layout = self.route.layout
        return torch.empty(self.heads or layout.units, layout.features, dtype=dtype, device="meta")

    # ------------------------------------------------------------- what taps call

    def loss_scale(self) -> Tensor | float | None:
        """Return the factor that the loss carries; D is divided by it."""
        return self.owner.current_loss_scale()

    def add(self, sums: Sums) -> None:
        """Take one backward firing whose gradient accumulates into the weight."""
        self._follow_gradient()
        if not sums.rows and self.owner.variant_of(self) == "B":
            # Nothing to rescale here, but ranks whose batch is not empty wait in their all-reduce.
            self._rescaled = self._summed_over_ranks(sums)
        self.pending.add(sums)
        self._everywhere.add(self._rescaled or sums)
        self._rescaled = self._total = None

    def rescale(self, sums: Sums) -> Tensor | None:
        """Return variant B's factors (units,) for D, from v with this pass blended in."""
        self._rescaled = None
        if self.owner.variant_of(self) != "B":
            return None
        self._follow_gradient()
        self._rescaled = self._summed_over_ranks(sums)
        s, _ = self.foreseen(self._rescaled)
        return s

    def rescale_errors(self, errors: Tensor) -> Tensor | None:
        """Return D S for variant B (``update="backward"``), else None."""
        if self.owner.variant_of(self) != "B":
            self._rescaled = None
            return None
        factors = self.rescale(self._unit_sums(errors))
        if factors is None:
            return None
        with span("scale", [self.weight]):
            return (errors * factors).to(errors.dtype)

    def update(self, errors: Tensor, activations: Tensor) -> Tensor | None:
        """Observe D and H and have the owner write the update (``update="backward"``).

        Returns:
            The column sums of D where they came along, else None.
        """
        with span("bookkeeping", [self.weight]):
            self._follow_gradient()
            ahead = self._foresee(errors, activations)
            if ahead is None:
                self._update(errors, activations)
                return None
            self._foresight = ahead
            try:
                self.owner.write_in_backward(self, errors, activations, ahead.sums)
            finally:
                # A copy of the layer's signals must not outlive their use.
                if self._foresight is ahead and ahead.scaled is not None:
                    self._foresight = ahead._replace(scaled=None)
            return ahead.error_sum

    def _foresee(self, errors: Tensor, activations: Tensor) -> Foresight | None:
        """Work everything out in one pass over D and H, where nothing else has a say in it."""
        if self.heads or self._everywhere.rows or self._rescaled is not None:
            return None
        owner = self.owner
        if owner.variant_of(self) == "B":
            return None
        structure, state = owner.structure_of(self), owner.state_of(self)
        # Where the product is of bfloat16 numbers its factors are applied to its sums.
        rounded = errors.dtype is activations.dtype is torch.bfloat16
        scale = owner.gemm == "float32" and not rounded
        return foresee(
            errors, activations, structure, state, owner.loss_reduction, self.backend, scale=scale
        )

    @property
    def scaled(self) -> tuple[Tensor, Tensor] | None:
        """D S and H C of the firing that is being written, if they are at hand."""
        return None if self._foresight is None else self._foresight.scaled

    def _update(self, errors: Tensor, activations: Tensor) -> None:
        sums = self._rescaled or self._unit_sums(errors)
        if self.owner.structure_of(self).factored:
            with span("reduce"):
                features = column_square_sum.on(self.backend)(activations)
            sums = sums._replace(feature_square_sum=features, feature_rows=activations.shape[0])
        self.owner.write_in_backward(self, errors, activations, sums)

    def _follow_gradient(self) -> None:
        """At a backward's first firing, drop sums whose gradient was dropped without a step.

        That happens after a GradScaler's overflow or a bad step, by ``model.zero_grad()``: the
        gradient is None then, or zero.
        """
        task, gradient = graph_task(), self.weight.grad
        if task == self._task:
            return
        self._task = task
        if gradient is None:
            self._version = None
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
        sizes = [(self.route.layout.units, 0)]
        synchronize([total], sizes, self.owner.loss_reduction, self.weight)
        assert total.units is not None
        return sums._replace(unit_square_sum=total.units.to(sums.unit_square_sum), rows=total.rows)

    # ------------------------------------------------------------- statistics and factors

    @property
    def observed(self) -> PendingSums:
        """What the next commit will take: sums over all ranks once they are synchronised."""
        return self.pending if self._total is None else self._total

    def begin_synchronization(self) -> PendingSums:
        """Return a copy of the pending sums, to be summed over ranks in place."""
        self._total = self.pending.copy()
        return self._total

    def clear(self) -> None:
        """Forget what was observed since the last commit."""
        self.pending.clear()
        self._everywhere.clear()
        self._rescaled = self._total = self._foresight = None

    def moments(self, pending: PendingSums) -> Moments:
        """Return the mean squares of ``pending``, heads pooled."""
        moments = pending.moments(self.owner.loss_reduction)
        if not self.heads or moments.units is None:
            return moments
        return Moments(moments.units.reshape(self.heads, -1).mean(-1), moments.features)

    @spanned("bookkeeping")
    def foreseen(self, sums: Sums) -> tuple[Tensor, Tensor | None]:
        """Return the factors as they would be if ``sums`` were committed now; nothing changes."""
        if self._foresight is not None and self._foresight.sums is sums:
            return self._foresight.factors
        structure, state = self.owner.structure_of(self), self.owner.state_of(self)
        moments = self.moments(self._everywhere.plus(sums))
        blended = {}
        for key, sample in (("v", moments.units), ("u", moments.features)):
            if sample is not None:
                with span("reduce"):
                    last = state[key].clone() if key in state else torch.zeros_like(sample)
                    blended[key] = ema_.on(self.backend)(last, sample, structure.beta)
        step = state.get("step", 0) + 1
        with span("scale"):
            factors = structure.factors(blended, step, self.backend)
        return self._expanded(*factors)

    @spanned("bookkeeping")
    def commit(self) -> None:
        """Move the pending statistics into the state, which must have been initialised."""
        state, structure = self.owner.state_of(self), self.owner.structure_of(self)
        state["step"] += 1
        factors = self._committed(structure, state)
        if factors is None:
            context = Context(state["step"], moments=self.moments(self.observed))
            with span("reduce"):
                structure.observe(state["v"], state, context)
        self.settle(structure, state, factors)

    def commits_plainly(self, structure: UnitFeatureDiagonal, state: Mapping[str, Any]) -> bool:
        """Return whether the commit is one that :func:`~.joint_commit.commit_each` can do."""
        if not self.prompt or self.heads or structure.clip != "absolute":
            return False
        observed = self.observed
        if self._foresight is not None or observed.units is None or not observed.rows:
            return False
        if not structure.factored:
            return fits(state["v"], observed.units)
        if observed.features is None or not observed.feature_rows:
            return False
        return fits(state["v"], observed.units, state["u"], observed.features)

    def settle(
        self,
        structure: UnitFeatureDiagonal,
        state: Mapping[str, Any],
        factors: tuple[Tensor, Tensor | None] | None,
    ) -> None:
        """End a commit; ``factors`` are those of the new statistics where they are known."""
        self._known = None if factors is None else KnownFactors.of(structure, state, factors)
        self.clear()

    def _committed(
        self, structure: UnitFeatureDiagonal, state: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None] | None:
        """Commit by a fused form and return the factors, or do nothing and return None."""
        if self.heads:
            return None
        ahead, observed = self._foresight, self.observed
        if ahead is not None and ahead.commit_(structure, state, observed):
            return ahead.factors
        return commit_(structure, state, observed, self.owner.loss_reduction, self.backend)

    @spanned("bookkeeping")
    def factors(self) -> tuple[Tensor, Tensor | None]:
        """Return s (m,) and c (n,) from the committed statistics; c is None unless factored."""
        state, structure = self.owner.state_of(self), self.owner.structure_of(self)
        if self._known is not None and self._known.hold(structure, state):
            return self._known.factors
        with span("scale"):
            factors = structure.factors(state, state["step"])
        return self._expanded(*factors)

    def _expanded(self, s: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.heads:
            s = s.repeat_interleave(self.route.layout.units // self.heads)
        return s, c
