"""A factor of the update that depends on the matrix's shape alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from neurms.core.ground.errors import check_choice
from neurms.core.structures.base import Context, State, Transform

__all__ = ["ShapeScale", "ShapeScaling"]

ShapeScaling = Literal["original", "match_rms_adamw"]


@dataclass(frozen=True)
class ShapeScale(Transform):
    """Multiply by a function of (m, n), so that one learning rate suits all layers.

    ``"original"``: sqrt(max(1, m/n)), the same change of the outputs per step in wide and tall
    layers. ``"match_rms_adamw"``: .2 sqrt(max(m, n)), an update whose entries have AdamW's usual
    size of .2 when the incoming matrix is orthogonal.

    Args:
        adjust_lr: Which of them; None multiplies by 1.

    Reference:
        Jordan et al., "Muon", 2024; Liu et al., "Muon is Scalable for LLM Training", 2025. The
        names are those of torch.optim.Muon's ``adjust_lr_fn``.

    Example:
        >>> import torch
        >>> ShapeScale("original")(torch.ones(8, 2), {}, Context(step=1)).max()
        tensor(2.)
    """

    adjust_lr: ShapeScaling | None = "original"
    row_local = True
    any_scale = True

    def __post_init__(self) -> None:
        check_choice("adjust_lr", self.adjust_lr, (None, "original", "match_rms_adamw"))

    def __call__(self, update: Tensor, state: State, context: Context) -> Tensor:
        """Return the scaled matrix (..., m, n)."""
        factor = self.factor(context.units(update), update.shape[-1])
        return update if factor == 1.0 else update * factor

    def factor(self, m: int, n: int) -> float:
        """Return what an (m, n) matrix is multiplied by."""
        if self.adjust_lr is None:
            return 1.0
        if self.adjust_lr == "match_rms_adamw":
            return 0.2 * math.sqrt(max(m, n))
        return math.sqrt(max(1.0, m / n))
