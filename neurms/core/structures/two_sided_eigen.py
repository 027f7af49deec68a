"""(U_R (x) U_L) D (U_R (x) U_L)^T: a diagonal in the eigenbases of both Shampoo factors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from neurms.compiled.bases import NOISE, descending_eigenvectors, orthogonal_iteration
from neurms.compiled.products import product
from neurms.compiled.symmetric import add_gram_
from neurms.core.ground.errors import (
    check_betas,
    check_choice,
    check_fraction,
    check_positive_int,
    check_real,
)
from neurms.core.structures.base import Context, State, Structure
from neurms.core.structures.eigen_basis import alive
from neurms.core.structures.kronecker import is_due, staggered

__all__ = ["TwoSidedEigen"]


@dataclass(frozen=True)
class TwoSidedEigen(Structure):
    """F ~ (U_R (x) U_L) D (U_R (x) U_L)^T: Adam in the eigenbases of E[G G^T] and E[G^T G].

    With Z = U_L^T G U_R: M <- b1 M + (1 - b1) Z ; V <- b2 V + (1 - b2) Z.^2 ;
    update c U_L (M / (sqrt(V) + eps)) U_R^T, c = sqrt(1 - b2^k) / (1 - b1^k) for the k-th update.
    Then L <- bs L + (1 - bs) G G^T and R <- bs R + (1 - bs) G^T G, and every ``interval`` updates
    one round U <- orth(L U), columns first sorted by their Rayleigh quotients (V along with them);
    M is carried over to the new bases. State for an m x n matrix: 2 mn + 2 m^2 + 2 n^2 numbers.

    Args:
        betas: b1 and b2, both in [0, 1).
        shampoo_beta: bs in [0, 1); None takes b2.
        eps: Added to the root before the correction c.
        interval: Updates from one round of the bases to the next.
        max_preconditioned_dim: A side longer than this keeps the identity as its basis, and no
            state.
        stagger: Turn the bases of different matrices at different steps; see
            :func:`~neurms.core.structures.kronecker.staggered`. For single matrices, not for a
            batch of them.

    Raises:
        ValueError: A setting is out of its range.

    Reference:
        Vyas et al., "SOAP", 2024, Algorithm 3, in the order of the authors' code: the first step
        only initialises the bases (its update is zero), and every gradient is projected with bases
        that have not seen it. Departures: parameters of more than two axes are flattened to a
        matrix; a unit or a feature that never had a gradient gets no update, nor does an entry of Z
        whose mean square is rounding noise beside the energy of its row and column. The bases'
        null spaces mix such units with living ones, and the quotient would move them.
    """

    betas: tuple[float, float] = (0.95, 0.95)
    shampoo_beta: float | None = None
    eps: float = 1e-8
    interval: int = 10
    max_preconditioned_dim: int = 10000
    stagger: bool = False

    def __post_init__(self) -> None:
        check_betas("betas", self.betas, 2)
        if self.shampoo_beta is not None:
            check_fraction("shampoo_beta", self.shampoo_beta)
        check_real("eps", self.eps)
        check_positive_int("interval", self.interval)
        check_positive_int("max_preconditioned_dim", self.max_preconditioned_dim)
        check_choice("stagger", self.stagger, (True, False))

    def init(self, matrix: Tensor) -> State:
        """Return the moments (..., m, n), and for each side its covariance and its basis."""
        state = {
            "exp_avg": matrix.new_zeros(matrix.shape),
            "exp_avg_sq": matrix.new_zeros(matrix.shape),
        }
        for side, size in (("left", matrix.shape[-2]), ("right", matrix.shape[-1])):
            if size <= self.max_preconditioned_dim:
                square = (*matrix.shape[:-2], size, size)
                state[f"{side}_covariance"] = matrix.new_zeros(square)
                state[f"{side}_basis"] = matrix.new_zeros(square)
        return state

    def observe(self, gradient: Tensor, state: State, context: Context) -> None:
        """Average the moments in the present bases, then the covariances, and turn the bases."""
        self._average(gradient, state, context)
        self._follow(gradient, state, context)

    def precondition(self, gradient: Tensor, state: State, context: Context) -> Tensor:
        """Return U_L ((U_L^T G U_R) / (sqrt(V) + eps)) U_R^T, shape (..., m, n)."""
        return self._scaled(rotated(gradient, state), state)

    def __call__(self, update: Tensor, state: State, context: Context) -> Tensor:
        """Return the update (..., m, n); zero in the first step, which only finds the bases."""
        self._average(update, state, context)
        if context.step == 1:
            preconditioned = torch.zeros_like(update)
        else:
            b1, b2 = self.betas
            count = context.step - 1
            correction = (1.0 - b2**count) ** 0.5 / (1.0 - b1**count)
            preconditioned = self._scaled(state["exp_avg"], state).mul_(correction)
        self._follow(update, state, context)
        return preconditioned

    def _average(self, gradient: Tensor, state: State, context: Context) -> None:
        if context.step == 1:
            return
        b1, b2 = self.betas
        z = rotated(gradient, state)
        state["exp_avg"].lerp_(z, 1.0 - b1)
        state["exp_avg_sq"].mul_(b2).addcmul_(z, z, value=1.0 - b2)

    def _scaled(self, z: Tensor, state: State) -> Tensor:
        squares = state["exp_avg_sq"]
        scaled = z / squares.sqrt().add_(self.eps)
        update = restored(torch.where(squares > _noise(squares), scaled, 0.0), state)
        if "left_basis" in state:
            update.mul_(alive(state["left_covariance"])[..., :, None])
        if "right_basis" in state:
            update.mul_(alive(state["right_covariance"])[..., None, :])
        return update

    def _follow(self, gradient: Tensor, state: State, context: Context) -> None:
        beta = self.betas[1] if self.shampoo_beta is None else self.shampoo_beta
        for side, matrix in sides(gradient, state):
            add_gram_(state[f"{side}_covariance"], matrix, beta, 1.0 - beta)
        if context.step == 1:
            for side, _ in sides(gradient, state):
                basis = descending_eigenvectors(state[f"{side}_covariance"])
                state[f"{side}_basis"].copy_(basis)
        elif is_due(staggered(context, self.interval, self.stagger), self.interval):
            self._turn(gradient, state)

    def _turn(self, gradient: Tensor, state: State) -> None:
        mean = restored(state["exp_avg"], state)
        for side, _ in sides(gradient, state):
            basis, order = orthogonal_iteration(state[f"{side}_covariance"], state[f"{side}_basis"])
            state[f"{side}_basis"].copy_(basis)
            squares = state["exp_avg_sq"]
            index, axis = (order[..., :, None], -2) if side == "left" else (order[..., None, :], -1)
            squares.copy_(squares.gather(axis, index.expand(squares.shape)))
        state["exp_avg"].copy_(rotated(mean, state))


def sides(gradient: Tensor, state: State) -> Iterator[tuple[str, Tensor]]:
    """Yield the name of each preconditioned side and the gradient with that side as its rows."""
    for side, matrix in (("left", gradient), ("right", gradient.mT)):
        if f"{side}_basis" in state:
            yield side, matrix


def rotated(gradient: Tensor, state: State) -> Tensor:
    """Return U_L^T G U_R, with the identity for a side without a basis."""
    if "left_basis" in state:
        gradient = product(state["left_basis"].mT, gradient)
    return product(gradient, state["right_basis"]) if "right_basis" in state else gradient


def restored(z: Tensor, state: State) -> Tensor:
    """Return U_L Z U_R^T, the inverse of :func:`rotated`."""
    if "left_basis" in state:
        z = product(state["left_basis"], z)
    return product(z, state["right_basis"].mT) if "right_basis" in state else z


def _noise(squares: Tensor) -> Tensor:
    """Return the mean square (..., m, n) that two rotations' rounding may leave in an entry."""
    ulp = torch.finfo(squares.dtype).eps
    rows, columns = squares.sum(-1, keepdim=True), squares.sum(-2, keepdim=True)
    return torch.maximum(rows, columns) * (NOISE * ulp) ** 2
