"""What the part of a gradient outside of a subspace contributes to the update."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from neurms.compiled.growth import growth_factor
from neurms.compiled.products import addmm_
from neurms.compiled.square_sums import square_sums
from neurms.core.ground.errors import check_fraction, check_real
from neurms.core.structures.base import Context, State
from neurms.core.structures.norms import frobenius
from neurms.core.transforms.safeguards import limited

__all__ = [
    "LARGE",
    "OptimalCompensation",
    "Projection",
    "Residual",
    "ScaledResidual",
    "column_scale",
]

LARGE = 1 << 17
"""Elements from which products cost more than the calls that save one."""

_TINY_NORM = 1e-8
_SURE = 0.05
"""Share of a column's energy that is left of a difference of two sums to a few ulps."""
_ROUNDING = 256.0
"""Ulps of a column that rounding may leave outside of a subspace that the column lies in."""


@dataclass(eq=False)
class Projection:
    """One step seen from the subspace.

    Args:
        gradient: G, shape (..., m, n).
        basis: U, shape (..., m, r).
        z: U^T G, shape (..., r, n).
        direction: What the structure made of z, shape (..., r, n).
        inner: The same times its factors: the update from within is U inner. Shape (..., r, n).
        energy: Average of colsum(z.^2) where the structure knows it, shape (..., n), else None.
    """

    gradient: Tensor
    basis: Tensor
    z: Tensor
    direction: Tensor
    inner: Tensor
    energy: Tensor | None
    _update: Tensor | None = None

    @property
    def inside(self) -> Tensor:
        """U z, the gradient's part in the subspace, shape (..., m, n)."""
        return self.basis @ self.z

    @property
    def update(self) -> Tensor:
        """The update from within, shape (..., m, n)."""
        if self._update is None:
            self._update = self.basis @ self.inner
        return self._update


class Residual(ABC):
    """What the part of a gradient outside of the subspace contributes to the update."""

    @abstractmethod
    def init(self, matrix: Tensor, knows_energy: bool) -> State:
        """Return the state for matrices like ``matrix`` (..., m, n)."""

    @abstractmethod
    def __call__(self, projection: Projection, state: State, context: Context) -> Tensor:
        """Return the contribution (..., m, n) and bring ``state`` up to date in place."""


@dataclass(frozen=True)
class OptimalCompensation(Residual):
    """S (x) U_c U_c^T with the best diagonal S: the optimal compensation of Alice.

    p <- b1 p + (1 - b1) colsum((G - U z).^2) ; C = sqrt(m - r) (G - U z) / sqrt(p) per column, its
    norm's growth limited by ``gamma``; the contribution is ``compensation`` C. State: n + 1
    numbers, and n more if the wrapped structure cannot tell the energy of its columns.

    Args:
        compensation: alpha_c, not negative.
        beta: b1 in [0, 1).
        gamma: Bound on the growth of C's norm from step to step, at least 1.
        floor: Share of a column's energy below which p is taken for rounding; None for (256 ulp)^2
            of the gradient's dtype, which is 1e-9 in float32.

    Raises:
        ValueError: A setting is out of its range.

    Reference:
        Structured-Fisher paper, Theorem 5.1 and Algorithm 3: s_j = E[colsum(G.^2) - colsum(z.^2)]_j
        / (m - r) is the least-squares fit of s U_c U_c^T to the j-th block of the Fisher matrix
        outside of the subspace. Settled here: the difference of the two sums is taken as the sum of
        squares of G - U z, equal to it for an orthonormal U and free of its cancellation; a column
        whose p is below ``floor`` of its energy (p plus the average of colsum(z.^2), both
        corrected for their start at zero) gets no compensation, because rounding is all that is
        left of it: a few ulps of the column, times the ratio of the largest singular value to the
        least one within the subspace.
    """

    compensation: float = 0.4
    beta: float = 0.9
    gamma: float = 1.01
    floor: float | None = None

    def __post_init__(self) -> None:
        check_real("compensation", self.compensation)
        check_fraction("beta", self.beta)
        check_real("gamma", self.gamma, low=1.0)
        if self.floor is not None:
            check_fraction("floor", self.floor)

    def init(self, matrix: Tensor, knows_energy: bool) -> State:
        """Return p and perhaps the energy within (..., n), and the last norm (...)."""
        row = (*matrix.shape[:-2], matrix.shape[-1])
        state = {
            "residual_energy": matrix.new_zeros(row),
            "phi": matrix.new_zeros(matrix.shape[:-2]),
        }
        if not knows_energy:
            state["inside_energy"] = matrix.new_zeros(row)
        return state

    def __call__(self, projection: Projection, state: State, context: Context) -> Tensor:
        """Return alpha_c C (..., m, n)."""
        residual = projection.gradient - projection.inside
        p = state["residual_energy"].lerp_(residual.square().sum(-2), 1.0 - self.beta)
        scale = self._scale(p, self._energy(projection, state, context), residual, projection.z)
        limit = limited(residual * scale[..., None, :], state["phi"], self.gamma, context.step)
        return limit * self.compensation

    def joined(self, projection: Projection, state: State, context: Context) -> Tensor:
        """Return U inner + alpha_c C of one matrix (m, n), from two products with U, not three.

        With D = alpha_c eta diag(sqrt(m - r) / sqrt(p)) it is G D + U (inner - z D). The squares of
        G - U z are those of G less those of z, as U is orthonormal; columns of which that
        difference is a small share have their residual formed, as all have it in a call.
        """
        gradient, basis, z = projection.gradient, projection.basis, projection.z
        whole, within = square_sums([gradient, z])[1]
        outside = whole - within
        doubtful = (outside < _SURE * whole).nonzero()[:, 0]
        sample = outside.to(gradient.dtype)
        own = gradient[:, doubtful] - basis @ z[:, doubtful]
        sample[doubtful] = own.square().sum(0)
        p = state["residual_energy"].lerp_(sample, 1.0 - self.beta)
        scale = self._scale(p, self._energy(projection, state, context), gradient, z)
        norm = (sample * scale.square()).sum().sqrt()
        eta = growth_factor(norm, state["phi"], self.gamma, context.step)
        scale = scale * (eta * self.compensation)
        apart, scale[doubtful] = scale[doubtful], 0.0
        update = addmm_(gradient * scale, basis, projection.inner - z * scale, 1.0, 1.0)
        update[:, doubtful] += own * apart
        return update

    def _energy(self, projection: Projection, state: State, context: Context) -> Tensor:
        """Return the average energy of the columns on p's scale, shape (..., n)."""
        if projection.energy is not None:
            inside = projection.energy * (1.0 - self.beta**context.step)
        else:
            sample = projection.z.square().sum(-2)
            inside = state["inside_energy"].lerp_(sample, 1.0 - self.beta)
        return state["residual_energy"] + inside

    def _scale(self, p: Tensor, energy: Tensor, residual: Tensor, z: Tensor) -> Tensor:
        outside = residual.shape[-2] - z.shape[-2]
        floor = (_ROUNDING * torch.finfo(p.dtype).eps) ** 2 if self.floor is None else self.floor
        kept = (p > 0) & (p >= floor * energy)
        return torch.where(kept, math.sqrt(outside) * p.rsqrt(), 0.0)


@dataclass(frozen=True)
class ScaledResidual(Residual):
    """The residual, each column scaled as the structure scaled its projection (Fira, Fira+).

    S_j = (G - U z)_j ||w_j|| / (||z_j|| + 1e-8) for w the structure's answer to z, its norm's
    growth limited by ``gamma``. With ``compensation`` (Fira+) it is rescaled to that multiple of
    the norm of the low-rank update instead. State: 1 number, none for Fira+.

    Args:
        gamma: Bound on the growth of S's norm from step to step, at least 1.
        inside: Factor of U z in the residual. The authors' code uses its ``scale`` here, so that
            the residual is not orthogonal to the subspace; 1 is the paper. Fira+ always uses 1.
        compensation: alpha_c of Fira+, or None.

    Raises:
        ValueError: A setting is out of its range.

    Reference:
        Chen et al., "Fira", 2024, eq. 8 and 9, in the form of the authors' code; Fira+ is the
        structured-Fisher paper's variant.
    """

    gamma: float = 1.01
    inside: float = 1.0
    compensation: float | None = None

    def __post_init__(self) -> None:
        check_real("gamma", self.gamma, low=1.0)
        check_real("inside", self.inside)
        if self.compensation is not None:
            check_real("compensation", self.compensation)

    def init(self, matrix: Tensor, knows_energy: bool) -> State:
        """Return ``phi`` (...), nothing for Fira+."""
        return {"phi": matrix.new_zeros(matrix.shape[:-2])} if self.compensation is None else {}

    def __call__(self, projection: Projection, state: State, context: Context) -> Tensor:
        """Return the scaled residual (..., m, n)."""
        factors = column_scale(projection.direction, projection.z)[..., None, :]
        if self.compensation is None:
            residual = projection.gradient - self.inside * projection.inside
            return limited(residual * factors, state["phi"], self.gamma, context.step)
        residual = (projection.gradient - projection.inside) * factors
        norm = frobenius(residual)
        within = frobenius(projection.update)
        ratio = torch.where(norm > 0, self.compensation * within / norm, 0.0)
        return residual * ratio[..., None, None]


def column_scale(direction: Tensor, z: Tensor) -> Tensor:
    """Return ||w_j|| / (||z_j|| + 1e-8) for the columns of w and z (..., r, n), shape (..., n)."""
    norms = torch.linalg.vector_norm(z, dim=-2) + _TINY_NORM
    scale: Tensor = torch.linalg.vector_norm(direction, dim=-2) / norms
    return scale
