"""Diag_i,b(V_ib): full blocks of b neighbouring features within each unit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neurms.compiled.roots import eigh, relative_floor
from neurms.core.ground.errors import check_fraction, check_positive_int, check_real
from neurms.core.structures.base import Context, State, Structure
from neurms.core.structures.kronecker import is_due

__all__ = ["BlockDiagonal", "block_width"]


def block_width(features: int, block_size: int) -> int:
    """Return the largest divisor of ``features`` that is at most ``block_size``."""
    return next(b for b in range(min(block_size, features), 0, -1) if features % b == 0)


@dataclass(frozen=True)
class BlockDiagonal(Structure):
    """F ~ the block-diagonal part of E[g g^T], in blocks of b features of one unit.

    V <- beta V + (1 - beta) g g^T per block, and the block of the update is
    ((V / (1 - beta^t))^(1/2) + eps I)^(-1) g. With b = 1 it is Adam's Diag(v).

    Args:
        beta: Decay of the averages.
        eps: Added to the square roots of the eigenvalues.
        block_size: Largest b; each matrix takes the largest divisor of n up to it.
        interval: Steps between two computations of the roots. With 1, or b = 1, they are not kept.
            A root that V has outgrown is computed anew at once, see below.

    Reference:
        "Block Adam" of Yen et al., NeurIPS 2023, section 5. Settled here: eigenvalues below
        rounding (b ulp of the block's largest) count as that much, since blocks are singular in the
        first steps. With an ``interval`` a root may meet a gradient in a direction that V had not
        seen, which it would blow up by 1/eps. As V holds (1 - beta) g g^T, |V^(-1/2) g|^2 is at
        most (1 - beta^t) / (1 - beta) for a fresh root; a block beyond that bound gets its root at
        once.
    """

    beta: float = 0.999
    eps: float = 1e-8
    block_size: int = 8
    interval: int = 1

    def __post_init__(self) -> None:
        check_fraction("beta", self.beta)
        check_real("eps", self.eps, strict=True)
        check_positive_int("block_size", self.block_size)
        check_positive_int("interval", self.interval)

    def init(self, matrix: Tensor) -> State:
        """Return ``second_moment`` (..., m, n/b, b, b), zero, and room for its roots."""
        *lead, n = matrix.shape
        b = block_width(n, self.block_size)
        state = {"second_moment": matrix.new_zeros((*lead, n // b, b, b))}
        if self.interval > 1 and b > 1:
            state["root"] = torch.zeros_like(state["second_moment"])
        return state

    def observe(self, gradient: Tensor, state: State, context: Context) -> None:
        """Average the blocks' outer products into ``second_moment``; new roots when due."""
        moment = state["second_moment"]
        g = gradient.unflatten(-1, moment.shape[-3:-1])
        moment.lerp_(g[..., :, None] * g[..., None, :], 1.0 - self.beta)
        if "root" not in state:
            return
        if is_due(context.step, self.interval):
            state["root"].copy_(self._root(moment, context.step))
            return
        scaled = (state["root"] @ g[..., None]).square().sum((-2, -1))
        outdated = scaled > (1.0 - self.beta**context.step) / (1.0 - self.beta)
        if bool(outdated.any()):
            state["root"][outdated] = self._root(moment[outdated], context.step)

    def precondition(self, gradient: Tensor, state: State, context: Context) -> Tensor:
        """Return the preconditioned gradient (..., m, n)."""
        moment = state["second_moment"]
        root = state["root"] if "root" in state else self._root(moment, context.step)
        g = gradient.unflatten(-1, moment.shape[-3:-1])
        update: Tensor = (root @ g[..., None])[..., 0].flatten(-2)
        return update

    def _root(self, moment: Tensor, step: int) -> Tensor:
        """Return ((V / correction)^(1/2) + eps I)^(-1) of each block."""
        corrected = moment / (1.0 - self.beta**step)
        if moment.shape[-1] == 1:
            return (corrected.sqrt() + self.eps).reciprocal()
        values, vectors = eigh(corrected)
        floored = torch.maximum(values, relative_floor(values))
        root: Tensor = (vectors / (floored.sqrt() + self.eps)[..., None, :]) @ vectors.mT
        return root
