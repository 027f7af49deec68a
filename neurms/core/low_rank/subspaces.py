"""Subspaces that gradients are projected on: tracked and switched, singular, or random.

Each gives, for a gradient G (..., m, n), a basis U (..., m, r) with r = min(rank, m, n): a larger
``rank`` is cut down matrix by matrix, so that one setting serves all layers of a model.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from neurms.compiled.bases import (
    complement_frame,
    leading_basis,
    ritz_basis,
    singular_basis,
    subspace_iteration,
)
from neurms.core.ground.errors import check_choice, check_fraction, check_positive_int
from neurms.core.structures.base import Context, State
from neurms.core.structures.eigen_basis import due

__all__ = [
    "FirstBasis",
    "RandomSubspace",
    "SingularSubspace",
    "Subspace",
    "Switching",
    "TrackedSubspace",
]

FirstBasis = Literal["gradient", "identity"]
Switching = Literal["complement", "full_basis", "gaussian_mix", "gaussian"]


@dataclass(frozen=True)
class Subspace(ABC):
    """Where a basis comes from and when it is renewed.

    Args:
        rank: Number of directions, at least 1; at most min(m, n) are used.
        interval: Steps from one renewal to the next.
    """

    rank: int
    interval: int = 200

    def __post_init__(self) -> None:
        check_positive_int("rank", self.rank)
        check_positive_int("interval", self.interval)

    @property
    def orthonormal(self) -> bool:
        """Whether the columns of the basis are."""
        return True

    def size(self, matrix: Tensor) -> int:
        """Return r = min(rank, m, n)."""
        return min(self.rank, matrix.shape[-2], matrix.shape[-1])

    def due(self, step: int) -> bool:
        """Return whether the basis is renewed in this step, counting steps from 1."""
        return (step - 1) % self.interval == 0

    def init(self, matrix: Tensor) -> State:
        """Return ``basis`` (..., m, r), zero before the first step."""
        return {"basis": matrix.new_zeros((*matrix.shape[:-1], self.size(matrix)))}

    def basis(self, matrix: Tensor, state: State, context: Context) -> Tensor:
        """Return the present basis (..., m, r)."""
        return state["basis"]

    @abstractmethod
    def renew(self, gradient: Tensor, state: State, context: Context, *, flipped: bool) -> None:
        """Choose a new basis from a gradient; ``flipped`` says that it is a transposed one."""

    def track(self, z: Tensor, state: State) -> None:  # noqa: B027  (an optional hook)
        """Take note of the projected gradient z (..., r, n) of this step."""


@dataclass(frozen=True)
class SingularSubspace(Subspace):
    """The leading left singular vectors of the gradient at each renewal (GaLore, Fira, APOLLO)."""

    def renew(self, gradient: Tensor, state: State, context: Context, *, flipped: bool) -> None:
        """Take them from the original orientation: LAPACK's signs differ between the two."""
        original = gradient.mT if flipped else gradient
        state["basis"].copy_(singular_basis(original, self.size(gradient), right=flipped))


@dataclass(frozen=True)
class RandomSubspace(Subspace):
    """Independent normal numbers of variance 1/r, redrawn at each renewal and kept nowhere.

    They are a function of the seed and of the step of the last renewal and are drawn again in every
    step: m r draws a step instead of m r numbers of state.
    """

    @property
    def orthonormal(self) -> bool:
        """Whether the columns of the basis are: no."""
        return False

    def init(self, matrix: Tensor) -> State:
        """Return no state."""
        return {}

    def basis(self, matrix: Tensor, state: State, context: Context) -> Tensor:
        """Return the projection (..., m, r), the same until the next renewal."""
        last = context.step - (context.step - 1) % self.interval
        shape = (*matrix.shape[:-1], self.size(matrix))
        return normal_draws(shape, matrix, replace(context, step=last)).div_(math.sqrt(shape[-1]))

    def renew(self, gradient: Tensor, state: State, context: Context, *, flipped: bool) -> None:
        """Do nothing: the draws follow from the step."""


@dataclass(frozen=True)
class TrackedSubspace(Subspace):
    """Eigenvectors of a tracked E[G G^T], some of them switched for random ones (Alice).

    At t = 1 and every ``interval`` steps: Q = b3 U Qr U^T + (1 - b3) G G^T, one round of subspace
    iteration gives its leading r eigenvectors; the ``leading`` first are kept, the other r -
    leading are drawn uniformly from the orthogonal complement of those. In every step Qr <- b3 Qr
    + (1 - b3) z z^T. Q is never formed. State: mr + r^2 numbers, mr without tracking.

    Args:
        rank: Number of directions, at most min(m, n) are used.
        interval: Steps from one renewal to the next.
        leading: Directions kept, in [1, rank]; cut down to min(rank, m, n) with ``rank``.
        beta: b3; without ``tracking`` taken as 0.
        tracking: Keep Qr.
        first_basis: ``"gradient"`` starts from the eigenvectors of G G^T, ``"identity"`` from the
            first r axes.
        switching: What takes the place of the r - ``leading`` other directions. ``"complement"``:
            directions uniform in the orthogonal complement of those kept. ``"full_basis"``: picked
            with equal chances from an orthonormal basis of all but those kept, the iteration's own
            further directions among it. ``"gaussian_mix"``: columns of independent normal numbers
            of variance 1/m, which are not orthonormal. ``"gaussian"``: all r columns such ones,
            and none kept.

    Raises:
        ValueError: ``rank`` below 1, ``leading`` above ``rank``, or another setting out of its
            range.

    Reference:
        Structured-Fisher paper, Algorithms 2 (switching), 4 and 10 (the iteration). Settled here:
        the first basis is the gradient's, because the paper's U_0 = 0 makes the first QR return the
        axes e_1 ... e_r; the other directions come from the complement of those kept; draws depend
        on seed and step alone, so that a resumed run repeats them; they keep away from rows that
        the gradient leaves zero (a dead unit stays where it is) as long as enough rows are left to
        draw from.
    """

    leading: int = 40
    beta: float = 0.999
    tracking: bool = True
    first_basis: FirstBasis = "gradient"
    switching: Switching = "complement"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive_int("leading", self.leading)
        if self.leading > self.rank:
            raise ValueError(
                f"leading={self.leading!r} is greater than rank={self.rank!r}; "
                "lower leading or raise rank"
            )
        check_fraction("beta", self.beta)
        check_choice("first_basis", self.first_basis, ("gradient", "identity"))
        check_choice("switching", self.switching, get_args(Switching))

    @property
    def orthonormal(self) -> bool:
        """Whether the columns of the basis are."""
        return self.switching in ("complement", "full_basis")

    def due(self, step: int) -> bool:
        """Return whether this is the first step or an ``interval``-th one."""
        return due(step, self.interval)

    def init(self, matrix: Tensor) -> State:
        """Return ``basis`` (..., m, r) and, with tracking, ``tracked`` (..., r, r)."""
        state = super().init(matrix)
        if self.tracking:
            r = self.size(matrix)
            state["tracked"] = matrix.new_zeros((*matrix.shape[:-2], r, r))
        return state

    def renew(self, gradient: Tensor, state: State, context: Context, *, flipped: bool) -> None:
        """Run subspace iteration, then switch."""
        basis = self._iterated(gradient, state, context.step)
        state["basis"].copy_(self._switched(basis, gradient, context))

    def track(self, z: Tensor, state: State) -> None:
        """Average z z^T."""
        if self.tracking:
            state["tracked"].lerp_(z @ z.mT, 1.0 - self.beta)

    def _iterated(self, gradient: Tensor, state: State, step: int) -> Tensor:
        old, tracked = state["basis"], state.get("tracked")
        beta = self.beta if self.tracking else 0.0
        if step > 1:
            return subspace_iteration(gradient, old, tracked, beta)
        if self.first_basis == "gradient":
            return leading_basis(gradient, old.shape[-1])
        axes = torch.eye(*old.shape[-2:], dtype=old.dtype, device=old.device)
        return ritz_basis(axes.expand(old.shape), gradient, old, tracked, beta)

    def _switched(self, basis: Tensor, gradient: Tensor, context: Context) -> Tensor:
        size = basis.shape[-1]
        leading = 0 if self.switching == "gaussian" else min(self.leading, size)
        if leading == size:
            return basis
        kept, others = basis[..., :leading], basis[..., leading:]
        # In float64, so that a model in another dtype draws the same directions.
        draws = normal_draws(others.shape, gradient.double(), context).to(basis.dtype)
        alive = (gradient != 0).any(-1, keepdim=True)
        enough = alive.sum(-2, keepdim=True) >= size
        draws = torch.where(alive | ~enough, draws, 0.0)
        if not self.orthonormal:
            return torch.cat([kept, draws / math.sqrt(basis.shape[-2])], dim=-1)
        if self.switching == "complement":
            return torch.cat([kept, complement_frame(kept, draws)], dim=-1)
        outside = complement_frame(basis, draws[..., : basis.shape[-2] - size])
        total = basis.shape[-2] - leading
        return torch.cat([kept, _picked(others, outside, total, context)], dim=-1)


def _picked(tracked: Tensor, outside: Tensor, total: int, context: Context) -> Tensor:
    """Return c of ``total`` directions: c tracked ones (..., m, c), and all outside of the basis.

    Each of them with the same chance; ``outside`` holds c uniform ones of the latter, or all.
    """
    *batch, _, c = tracked.shape
    picks = [
        torch.randperm(total, generator=context.generator(index, stream=1))[:c]
        for index in range(math.prod(batch))
    ]
    pick = torch.stack(picks).reshape(*batch, c).to(tracked.device)
    # Which of the outside ones fill the places that no tracked one takes: the first, in order.
    number = ((pick >= c).cumsum(-1) + c - 1).where(pick >= c, pick)
    joint = torch.cat([tracked, outside], dim=-1)
    return joint.gather(-1, number[..., None, :].expand(tracked.shape))


def normal_draws(shape: tuple[int, ...], like: Tensor, context: Context) -> Tensor:
    """Return normal numbers (..., m, k), each matrix's from its own seed and the context's step."""
    draws = [
        torch.randn(shape[-2:], generator=context.generator(index), dtype=like.dtype, device="cpu")
        for index in range(math.prod(shape[:-2]))
    ]
    return torch.stack(draws).reshape(shape).to(like.device)
