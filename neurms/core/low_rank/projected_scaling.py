"""Channel or tensor factors for the raw gradient, measured on a low-rank projection of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from neurms.compiled.products import product
from neurms.core.ground.errors import check_choice
from neurms.core.low_rank.extension import flips
from neurms.core.low_rank.residuals import column_scale
from neurms.core.low_rank.subspaces import Subspace
from neurms.core.structures.base import Context, State, Structure
from neurms.core.structures.norms import frobenius

__all__ = ["ProjectedScaling", "ScaleType"]

ScaleType = Literal["channel", "tensor"]


@dataclass(frozen=True)
class ProjectedScaling(Structure):
    """F ~ S (x) I, or s I, with the scale of each column learned from a low-rank projection.

    With z = P^T G of r rows and w = structure(z): column j of the *raw* gradient is multiplied by
    ||w_j|| / (||z_j|| + 1e-8) (``"channel"``), or all of it by ||w|| / (||z|| + 1e-8)
    (``"tensor"``). Columns are those of G, or of G^T where m >= n: one channel for each entry of
    the longer side. State: the subspace's and the structure's.

    Args:
        structure: What runs on the (r, n) matrices z; Adam in APOLLO.
        subspace: Where the projection P comes from.
        scale_type: ``"channel"`` or ``"tensor"``.

    Raises:
        ValueError: A setting is out of its range.

    Reference:
        Zhu et al., "APOLLO", 2024, Algorithm 1; the raw gradient is scaled, not its projection.
    """

    structure: Structure
    subspace: Subspace
    scale_type: ScaleType = "channel"

    def __post_init__(self) -> None:
        check_choice("scale_type", self.scale_type, ("channel", "tensor"))

    def init(self, matrix: Tensor) -> State:
        """Return the joint state of subspace and structure."""
        wide = self._wide(matrix)
        z = wide.new_empty((*wide.shape[:-2], self.subspace.size(wide), wide.shape[-1]))
        return self.subspace.init(wide) | self.structure.init(z)

    def observe(self, gradient: Tensor, state: State, context: Context) -> None:
        """Renew the projection when it is due and let the structure observe z."""
        z = self._projected(gradient, state, context)
        self.structure.observe(z, state, replace(context, weight=None))

    def precondition(self, gradient: Tensor, state: State, context: Context) -> Tensor:
        """Return the gradient scaled by what the structure makes of its own projection."""
        wide = self._wide(gradient)
        z = product(self.subspace.basis(wide, state, context).mT, wide)
        inner = self.structure.precondition(z, state, replace(context, weight=None))
        return self._scaled(gradient, inner, z)

    def __call__(self, update: Tensor, state: State, context: Context) -> Tensor:
        """Return the scaled gradient (..., m, n)."""
        z = self._projected(update, state, context)
        direction = self.structure(z, state, replace(context, weight=None))
        return self._scaled(update, direction, z)

    def _projected(self, gradient: Tensor, state: State, context: Context) -> Tensor:
        wide = self._wide(gradient)
        if self.subspace.due(context.step):
            self.subspace.renew(wide, state, context, flipped=wide is not gradient)
        return product(self.subspace.basis(wide, state, context).mT, wide)

    def _scaled(self, gradient: Tensor, direction: Tensor, z: Tensor) -> Tensor:
        if self.scale_type == "tensor":
            return gradient * (frobenius(direction) / (frobenius(z) + 1e-8))[..., None, None]
        factors = column_scale(direction, z)
        flipped = flips(gradient, "tall or square")
        return gradient * (factors[..., :, None] if flipped else factors[..., None, :])

    def _wide(self, gradient: Tensor) -> Tensor:
        return gradient.mT if flips(gradient, "tall or square") else gradient
