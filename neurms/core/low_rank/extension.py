"""The low-rank extension: a full-rank structure inside a subspace, and what becomes of the rest."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor, matmul

from neurms.compiled.products import product
from neurms.core.ground.errors import check_choice, check_real
from neurms.core.low_rank.residuals import LARGE, OptimalCompensation, Projection, Residual
from neurms.core.low_rank.subspaces import Subspace
from neurms.core.structures.base import Context, State, Structure
from neurms.core.transforms.bias_correction import BiasCorrection

__all__ = ["LowRank", "Transpose", "flips"]

Transpose = Literal["never", "tall", "tall or square"]


@runtime_checkable
class _KnowsEnergy(Protocol):
    """A structure whose own state tells the average of colsum(z.^2)."""

    def column_energy(self, state: State, context: Context) -> Tensor: ...


@runtime_checkable
class _Rotatable(Protocol):
    """A structure whose state can be carried over to a new basis."""

    def rotate_(self, state: State, rotation: Tensor) -> None: ...


@dataclass(frozen=True)
class LowRank(Structure):
    """Any structure, run on z = U^T G, and a residual for what U does not span.

    update = scale U structure(U^T G) + residual. Tracking and switching belong to the subspace,
    compensation to the residual; without any of the three this is GaLore's projection.

    Args:
        structure: What runs on the (r, n) matrices z. It sees no weights.
        subspace: Where U comes from.
        residual: What becomes of G - U U^T G; None drops it.
        transpose: Project G^T instead where m > n (``"tall"``), or m >= n (``"tall or square"``),
            so that U is taken on the shorter side.
        scale: Factor of the update from within the subspace.
        correction: Adam's correction of that update for its averages' start at zero; None for none.
        rotate_moments: Carry the structure's moments and the tracked Qr over when U changes. The
            papers leave them as they are, in coordinates that no longer exist.

    Raises:
        ValueError: A setting is out of its range, or ``rotate_moments`` with a structure that has
            no ``rotate_``.

    Reference:
        Structured-Fisher paper, section 5, which applies it to Eigen-Adam and leaves others open.

    Example:
        >>> import torch
        >>> from neurms.core.structures.projected_diagonal import ProjectedDiagonal
        >>> from neurms.core.low_rank.subspaces import SingularSubspace
        >>> galore = LowRank(ProjectedDiagonal((0.0, 0.0)), SingularSubspace(rank=1))
        >>> gradient = torch.tensor([[3.0, 0.0, 3.0], [0.0, 0.5, 0.0]])
        >>> galore(gradient, galore.init(gradient), Context(step=1)).abs()
        tensor([[1., 0., 1.],
                [0., 0., 0.]])
    """

    structure: Structure
    subspace: Subspace
    residual: Residual | None = None
    transpose: Transpose = "never"
    scale: float = 1.0
    rotate_moments: bool = False
    correction: BiasCorrection | None = None

    def __post_init__(self) -> None:
        check_choice("transpose", self.transpose, ("never", "tall", "tall or square"))
        check_real("scale", self.scale)
        if self.structure.needs_weight:
            raise ValueError(
                f"structure={self.structure!r} needs weights, which have no form in the subspace"
            )
        if self.rotate_moments and not self.subspace.orthonormal:
            raise ValueError(
                "rotate_moments=True needs orthonormal bases, which random columns are not; pass "
                "rotate_moments=False"
            )
        if self.rotate_moments and not isinstance(self.structure, _Rotatable):
            raise ValueError(
                f"rotate_moments=True needs a structure with rotate_(), not {self.structure!r}; "
                "pass rotate_moments=False"
            )

    def init(self, matrix: Tensor) -> State:
        """Return the joint state of subspace, structure and residual."""
        wide = matrix.mT if flips(matrix, self.transpose) else matrix
        z = wide.new_empty((*wide.shape[:-2], self.subspace.size(wide), wide.shape[-1]))
        parts = [self.subspace.init(wide), self.structure.init(z)]
        if self.residual is not None:
            parts.append(self.residual.init(wide, self._knows_energy))
        state: State = {}
        for part in parts:
            if clash := part.keys() & state.keys():
                raise ValueError(f"subspace, structure and residual all keep {sorted(clash)}")
            state |= part
        return state

    def observe(self, gradient: Tensor, state: State, context: Context) -> None:
        """Renew the subspace when it is due and let the structure observe z."""
        wide = gradient.mT if flips(gradient, self.transpose) else gradient
        _, z = self._project(wide, state, context, flipped=wide is not gradient)
        self.structure.observe(z, state, replace(context, weight=None))

    def precondition(self, gradient: Tensor, state: State, context: Context) -> Tensor:
        """Return scale U structure.precondition(U^T G), without a residual, (..., m, n)."""
        wide = gradient.mT if flips(gradient, self.transpose) else gradient
        basis = self.subspace.basis(wide, state, context)
        inner = self.structure.precondition(
            product(basis.mT, wide), state, replace(context, weight=None)
        )
        update = product(basis, inner) * self.scale
        return update.mT if wide is not gradient else update

    def __call__(self, update: Tensor, state: State, context: Context) -> Tensor:
        """Return the structure's update from within plus the residual's, shape (..., m, n)."""
        wide = update.mT if flips(update, self.transpose) else update
        basis, z = self._project(wide, state, context, flipped=wide is not update)
        # As it is, if it can be: to replace a field takes ten calls.
        own = context if context.weight is None else replace(context, weight=None)
        direction = self.structure(z, state, own)
        inner = direction if self.correction is None else self.correction(direction, {}, own)
        if self.scale != 1.0:
            # On r rows instead of m.
            inner = inner * self.scale
        if self.residual is None:
            # In the orientation of the weight, which a transposed one is added to slowly.
            multiply = product if wide.numel() >= LARGE else matmul
            return multiply(inner.mT, basis.mT) if wide is not update else multiply(basis, inner)
        energy = None
        if self._knows_energy:
            assert hasattr(self.structure, "column_energy")
            energy = self.structure.column_energy(state, context)
        seen = Projection(wide, basis, z, direction, inner, energy)
        residual = self.residual
        if isinstance(residual, OptimalCompensation) and self._is_large(wide):
            result = residual.joined(seen, state, context)
        else:
            result = seen.update + residual(seen, state, context)
        return result.mT if wide is not update else result

    def _is_large(self, wide: Tensor) -> bool:
        """Return whether a product with the basis is worth the calls that save it."""
        large = wide.numel() >= LARGE and wide.ndim == 2 and wide.is_cpu
        return large and self.subspace.orthonormal

    @cached_property
    def _knows_energy(self) -> bool:
        # Looked up once: to ask a protocol takes forty calls.
        return isinstance(self.structure, _KnowsEnergy)

    def _project(
        self, wide: Tensor, state: State, context: Context, *, flipped: bool
    ) -> tuple[Tensor, Tensor]:
        if self.subspace.due(context.step):
            old = self.subspace.basis(wide, state, context).clone() if self.rotate_moments else None
            self.subspace.renew(wide, state, context, flipped=flipped)
            if old is not None and context.step > 1:
                self._rotate(self.subspace.basis(wide, state, context).mT @ old, state)
        basis = self.subspace.basis(wide, state, context)
        # Small matrices wait for calls.
        z = (product if wide.numel() >= LARGE else matmul)(basis.mT, wide)
        self.subspace.track(z, state)
        return basis, z

    def _rotate(self, rotation: Tensor, state: State) -> None:
        assert isinstance(self.structure, _Rotatable)
        self.structure.rotate_(state, rotation)
        if "tracked" in state:
            state["tracked"].copy_(rotation @ state["tracked"] @ rotation.mT)


def flips(matrix: Tensor, transpose: Transpose) -> bool:
    """Return whether a matrix (..., m, n) is to be transposed first."""
    m, n = matrix.shape[-2:]
    return (m > n and transpose != "never") or (m == n and transpose == "tall or square")
