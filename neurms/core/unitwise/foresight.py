"""A firing's statistics, factors and scaled signals, worked out in one pass over D and H."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neurms.compiled.signals import scaled_signal
from neurms.core.ground.spans import spanning
from neurms.core.structures.unit_feature import UnitFeatureDiagonal
from neurms.core.taps.protocol import Sums
from neurms.core.unitwise.rule import LossReduction
from neurms.core.unitwise.statistics import Basis, Factors, PendingSums, basis_of, is_basis

__all__ = ["Foresight", "foresee"]


@dataclass(slots=True, eq=False)
class Foresight:
    """What committing one firing now would give.

    Args:
        sums: The firing's sums.
        basis: The settings, and v and u before it.
        moments: v and u after it.
        factors: s and c after it.
        error_sum: Column sums of D, the bias's gradient.
    """

    sums: Sums
    basis: Basis
    moments: tuple[Tensor, ...]
    factors: Factors
    error_sum: Tensor

    def holds(
        self, structure: UnitFeatureDiagonal, state: Mapping[str, Any], pending: PendingSums
    ) -> bool:
        """Return whether committing ``pending`` now gives what was foreseen."""
        return (
            pending.units is self.sums.unit_square_sum
            and pending.features is self.sums.feature_square_sum
            and is_basis(self.basis, structure, state)
        )


def foresee(
    errors: Tensor,
    activations: Tensor,
    structure: UnitFeatureDiagonal,
    state: Mapping[str, Any],
    reduction: LossReduction,
    backend: str,
    *,
    scale: bool = True,
) -> tuple[Foresight, tuple[Tensor, Tensor] | None] | None:
    """Observe a firing's D and H, and scale them if so asked.

    Args:
        errors: D, shape (rows, m), at least one row.
        activations: H, shape (rows, n).
        structure: The layer's settings.
        state: Its state; read only.
        reduction: How the loss reduces over rows.
        backend: How kernels run.
        scale: Whether D S and H C are wanted.

    Returns:
        What is foreseen, and D S and H C or None; None for both where there is no fused form.
    """
    if "v" not in state:
        return None
    v, u = state["v"], state["u"] if "u" in state else None
    if structure.clip != "absolute" or not (errors.dtype is v.dtype or _go_with(v, errors, scale)):
        return None
    if structure.factored and (u is None or not _go_with(u, activations, scale)):
        return None
    rows = errors.shape[0]
    root = (structure.beta, structure.divisor(state["step"] + 1), structure.eps, structure.v_min)
    observe: Any = scaled_signal.on(backend)
    settings = (*root, structure.s_min, structure.s_max, scale)
    q, total, v_next, s, d = spanning(
        "scale", None, observe, errors, v, reduction == "mean", *settings
    )
    basis = basis_of(structure, state)
    if u is None or not structure.factored:
        seen = Foresight(Sums(q, rows), basis, (v_next,), (s, None), total)
        return seen, (d, activations) if scale else None
    settings = (*root, structure.c_min, structure.c_max, scale)
    qh, _, u_next, c, h = spanning("scale", None, observe, activations, u, False, *settings)
    sums = Sums(q, rows, qh, activations.shape[0])
    return Foresight(sums, basis, (v_next, u_next), (s, c), total), (d, h) if scale else None


def _go_with(moments: Tensor, signal: Tensor, scale: bool) -> bool:
    """Return whether a signal may be observed at once, and keeps its dtype if it is scaled."""
    if signal.dtype is moments.dtype:
        return True
    return not scale and signal.dtype is torch.bfloat16 and moments.dtype is torch.float32
