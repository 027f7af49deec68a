"""A layer under NeuRMS's rule: its tap's sink, its statistics, its scale factors."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from neurms.compiled.reductions import column_square_sum
from neurms.compiled.scaling import ema_
from neurms.core.routing import Route
from neurms.core.statistics import LossReduction, PendingSums, synchronize
from neurms.core.structures.base import Context, Moments
from neurms.core.structures.unit_feature import UnitFeatureDiagonal
from neurms.core.taps.accumulation import graph_task
from neurms.core.taps.backward import BackwardUpdateTap
from neurms.core.taps.hooks import HookTap
from neurms.core.taps.protocol import Sums

__all__ = ["LayerOwner", "TappedLayer", "Variant"]

Variant = Literal["U", "B", "F"]


class LayerOwner(Protocol):
    """What holds layers: the optimizer, or a callback beside a foreign one."""

    backend: str
    loss_reduction: LossReduction

    def structure_of(self, layer: TappedLayer) -> UnitFeatureDiagonal:
        """Return the structure that the layer's current settings make."""

    def variant_of(self, layer: TappedLayer) -> Variant:
        """Return where the scale factors act."""

    def state_of(self, layer: TappedLayer) -> dict[str, Any]:
        """Return the layer's state: empty before its first commit, then ``step``, ``v``, ``u``."""

    def current_loss_scale(self) -> float | None:
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
        owner: Holds state and settings.
        heads: Number of equal runs of units that share one second moment, their mean; 0 keeps one
            for each unit.
    """

    def __init__(
        self, route: Route, bias: Tensor | None, owner: LayerOwner, heads: int = 0
    ) -> None:
        self.route = route
        self.bias = bias
        self.owner = owner
        self.heads = heads
        self.pending = PendingSums()
        self.tap: HookTap | BackwardUpdateTap | None = None
        self._task: int | None = None
        self._everywhere = PendingSums()
        self._rescaled: Sums | None = None

    @property
    def name(self) -> str:
        """Qualified name of the weight."""
        return self.route.name

    @property
    def weight(self) -> Tensor:
        """The weight."""
        return self.route.parameter

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

    def loss_scale(self) -> float | None:
        """Return the factor that the loss carries; D is divided by it."""
        return self.owner.current_loss_scale()

    def add(self, sums: Sums) -> None:
        """Take one backward firing whose gradient accumulates into the weight."""
        task = graph_task()
        if task != self._task and self.weight.grad is None:
            # The gradients that the pending sums belong to were dropped without a step (a GradScaler's
            # overflow followed by model.zero_grad()), so the sums go too.
            self.clear()
        self._task = task
        self.pending.add(sums)
        self._everywhere.add(self._rescaled or sums)

    def rescale(self, sums: Sums) -> Tensor | None:
        """Return variant B's factors (units,) for D, from v with this pass blended in."""
        self._rescaled = None
        if self.owner.variant_of(self) != "B":
            return None
        self._rescaled = self._summed_over_ranks(sums)
        s, _ = self.foreseen(self._rescaled)
        return s

    def rescale_errors(self, errors: Tensor) -> Tensor | None:
        """Return D S for variant B (``update="backward"``), else None."""
        factors = self.rescale(self._unit_sums(errors))
        return None if factors is None else (errors * factors).to(errors.dtype)

    def update(self, errors: Tensor, activations: Tensor) -> None:
        """Observe D and H and have the owner write the update (``update="backward"``)."""
        sums = self._rescaled or self._unit_sums(errors)
        if self.owner.structure_of(self).factored:
            features = column_square_sum.on(self.owner.backend)(activations)
            sums = sums._replace(
                feature_square_sum=features, feature_rows=activations.shape[0]
            )
        self.owner.write_in_backward(self, errors, activations, sums)

    def _unit_sums(self, errors: Tensor) -> Sums:
        return Sums(column_square_sum.on(self.owner.backend)(errors), errors.shape[0])

    def _summed_over_ranks(self, sums: Sums) -> Sums:
        total = PendingSums()
        total.add(sums)
        sizes = [(self.route.layout.units, 0)]
        synchronize([total], sizes, self.owner.loss_reduction, self.weight)
        assert total.units is not None
        return sums._replace(unit_square_sum=total.units.to(sums.unit_square_sum), rows=total.rows)

    # ------------------------------------------------------------- statistics and factors

    def clear(self) -> None:
        """Forget what was observed since the last commit."""
        self.pending.clear()
        self._everywhere.clear()
        self._rescaled = None

    def moments(self, pending: PendingSums) -> Moments:
        """Return the mean squares of ``pending``, heads pooled."""
        moments = pending.moments(self.owner.loss_reduction)
        if not self.heads or moments.units is None:
            return moments
        return Moments(moments.units.reshape(self.heads, -1).mean(-1), moments.features)

    def foreseen(self, sums: Sums) -> tuple[Tensor, Tensor | None]:
        """Return the factors as they would be if ``sums`` were committed now; nothing changes."""
        structure, state = self.owner.structure_of(self), self.owner.state_of(self)
        moments = self.moments(self._everywhere.plus(sums))
        blended = {}
        for key, sample in (("v", moments.units), ("u", moments.features)):
            if sample is not None:
                last = state[key].clone() if key in state else torch.zeros_like(sample)
                blended[key] = ema_.on(self.owner.backend)(last, sample, structure.beta)
        return self._expanded(*structure.factors(blended, state.get("step", 0) + 1, self.owner.backend))

    def commit(self) -> None:
        """Move the pending statistics into the state, which must have been initialised."""
        state = self.owner.state_of(self)
        state["step"] += 1
        moments = self.moments(self.pending)
        context = Context(state["step"], moments=moments)
        self.owner.structure_of(self).observe(state["v"], state, context)
        self.clear()

    def factors(self) -> tuple[Tensor, Tensor | None]:
        """Return s (m,) and c (n,) from the committed statistics; c is None unless factored."""
        state = self.owner.state_of(self)
        return self._expanded(*self.owner.structure_of(self).factors(state, state["step"]))

    def _expanded(self, s: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.heads:
            s = s.repeat_interleave(self.route.layout.units // self.heads)
        return s, c
