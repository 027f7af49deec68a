"""A firing's statistics, factors and scaled signals, worked out in one pass over D and H."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neurms.compiled.moments import move_moments
from neurms.compiled.signals import scaled_signal
from neurms.core.ground.spans import span
from neurms.core.structures.unit_feature import UnitFeatureDiagonal
from neurms.core.taps.protocol import Sums
from neurms.core.unitwise.statistics import LossReduction, PendingSums

__all__ = ["Foresight", "KnownFactors", "commit_", "foresee"]

Factors = tuple[Tensor, Tensor | None]


class KnownFactors(NamedTuple):
    """Factors, and the statistics and settings that they were made of."""

    structure: UnitFeatureDiagonal
    step: int
    made_of: tuple[tuple[Tensor, int], ...]
    factors: Factors

    @classmethod
    def of(
        cls, structure: UnitFeatureDiagonal, state: Mapping[str, Any], factors: Factors
    ) -> KnownFactors:
        """Return the factors of a layer's present state."""
        return cls(structure, state["step"], _versions(state), factors)

    def hold(self, structure: UnitFeatureDiagonal, state: Mapping[str, Any]) -> bool:
        """Return whether they are still those of ``state``: nothing was written or replaced."""
        return (
            self.structure is structure
            and self.step == state["step"]
            and _same(self.made_of, _versions(state))
        )


class Foresight(NamedTuple):
    """What committing one firing now would give.

    Args:
        sums: The firing's sums.
        structure: The settings that the rest was made with.
        step: The step that a commit would make.
        made_of: v and u before it, with their versions.
        moments: v and u after it.
        factors: s and c after it.
        error_sum: Column sums of D, the bias's gradient.
        scaled: D S and H C, where they were asked for; dropped once they are used.
    """

    sums: Sums
    structure: UnitFeatureDiagonal
    step: int
    made_of: tuple[tuple[Tensor, int], ...]
    moments: tuple[Tensor, ...]
    factors: Factors
    error_sum: Tensor
    scaled: tuple[Tensor, Tensor] | None = None

    def commit_(
        self, structure: UnitFeatureDiagonal, state: Mapping[str, Any], pending: PendingSums
    ) -> bool:
        """Move ``state`` on if a commit of ``pending`` is what was foreseen; return whether."""
        foreseen = (
            self.structure is structure
            and self.step == state["step"]
            and pending.units is self.sums.unit_square_sum
            and pending.features is self.sums.feature_square_sum
            and _same(self.made_of, _versions(state))
        )
        if foreseen:
            with span("reduce"):
                for (moment, _), value in zip(self.made_of, self.moments, strict=True):
                    moment.copy_(value)
        return foreseen


def foresee(
    errors: Tensor,
    activations: Tensor,
    structure: UnitFeatureDiagonal,
    state: Mapping[str, Any],
    reduction: LossReduction,
    backend: str,
    *,
    scale: bool = True,
) -> Foresight | None:
    """Observe a firing's D and H, and scale them if so asked; None where that has no fused form.

    Args:
        errors: D, shape (rows, m), at least one row.
        activations: H, shape (rows, n).
        structure: The layer's settings.
        state: Its state; read only.
        reduction: How the loss reduces over rows.
        backend: How kernels run.
        scale: Whether D S and H C are wanted.
    """
    v, u = state.get("v"), state.get("u")
    if v is None or structure.clip != "absolute" or not _go_with(v, errors, scale):
        return None
    if structure.factored and (u is None or not _go_with(u, activations, scale)):
        return None
    step, rows = state["step"] + 1, errors.shape[0]
    root = (structure.beta, structure.divisor(step), structure.eps, structure.v_min)
    observe: Any = scaled_signal.on(backend)
    with span("scale"):
        q, total, v_next, s, d = observe(
            errors, v, reduction == "mean", *root, structure.s_min, structure.s_max, scale
        )
    sums, made_of = Sums(q, rows), _versions(state)
    if u is None or not structure.factored:
        scaled = (d, activations) if scale else None
        return Foresight(sums, structure, step, made_of, (v_next,), (s, None), total, scaled)
    with span("scale"):
        qh, _, u_next, c, h = observe(
            activations, u, False, *root, structure.c_min, structure.c_max, scale
        )
    sums = sums._replace(feature_square_sum=qh, feature_rows=activations.shape[0])
    scaled = (d, h) if scale else None
    return Foresight(sums, structure, step, made_of, (v_next, u_next), (s, c), total, scaled)


def commit_(
    structure: UnitFeatureDiagonal,
    state: Mapping[str, Any],
    pending: PendingSums,
    reduction: LossReduction,
    backend: str,
) -> Factors | None:
    """Move v and u by pending sums; return the factors, or None where that has no fused form.

    Args:
        structure: The layer's settings.
        state: Its state, whose ``step`` counts this commit already; overwritten.
        pending: What was observed.
        reduction: How the loss reduces over rows.
        backend: How kernels run.
    """
    if structure.clip != "absolute" or pending.units is None or not pending.rows:
        return None
    if structure.factored and (pending.features is None or not pending.feature_rows):
        return None
    correction, move = [structure.divisor(state["step"])], move_moments.on(backend)
    root = structure.beta, structure.eps, structure.v_min
    weight, bounds = [pending.unit_weight(reduction)], (structure.s_min, structure.s_max)
    with span("scale"):
        moved, (s,) = move([state["v"]], [pending.units], weight, correction, *root, *bounds)
        state["v"].copy_(moved[0])
    if not structure.factored or pending.features is None:
        return s, None
    weight, bounds = [1.0 / pending.feature_rows], (structure.c_min, structure.c_max)
    with span("scale"):
        moved, (c,) = move([state["u"]], [pending.features], weight, correction, *root, *bounds)
        state["u"].copy_(moved[0])
    return s, c


def _go_with(moments: Tensor, signal: Tensor, scale: bool) -> bool:
    """Return whether a signal may be observed at once, and keeps its dtype if it is scaled."""
    same = signal.dtype is moments.dtype
    return same or (not scale and signal.dtype is torch.bfloat16 and moments.dtype is torch.float32)


def _versions(state: Mapping[str, Any]) -> tuple[tuple[Tensor, int], ...]:
    v, u = state["v"], state.get("u")
    seen = (v, v._version)
    return (seen,) if u is None else (seen, (u, u._version))


def _same(one: tuple[tuple[Tensor, int], ...], other: tuple[tuple[Tensor, int], ...]) -> bool:
    if len(one) != len(other):
        return False
    for (tensor, version), (now, version_now) in zip(one, other, strict=True):
        if tensor is not now or version != version_now:
            return False
    return True
