"""Diag(v): one second moment for every entry, the structure of Adam and RMSProp."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from neurms.core.ground.errors import check_betas, check_real
from neurms.core.structures.base import Context, State, Structure

__all__ = ["Diagonal"]


@dataclass(frozen=True)
class Diagonal(Structure):
    """F ~ Diag(v) with v the average of G.^2, applied to the averaged gradient.

    M <- b1 M + (1 - b1) G ; V <- b2 V + (1 - b2) G.^2 ; update M / (sqrt(V) + eps), both averages
    divided by 1 - b^t first with ``bias_correction``. With b1 = 0 no M is kept (RMSProp). State:
    2 mn numbers, mn for b1 = 0.

    Args:
        betas: b1 and b2, both in [0, 1).
        eps: Added to the root; with 0 an entry that never had a gradient gets no update.
        bias_correction: Correct both averages for their start at zero.

    Raises:
        ValueError: A setting is out of its range.

    Reference:
        Kingma and Ba, "Adam", 2015, Algorithm 1; the structured-Fisher paper, section 3 (the best
        diagonal F in Frobenius norm is Diag(E[g.^2])).

    Example:
        >>> import torch
        >>> adam = Diagonal()
        >>> gradient = torch.tensor([[0.5, -20.0]])
        >>> adam(gradient, adam.init(gradient), Context(step=1))
        tensor([[ 1.0000, -1.0000]])
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    bias_correction: bool = True
    row_local = True

    def __post_init__(self) -> None:
        check_betas("betas", self.betas, 2)
        object.__setattr__(self, "betas", tuple(self.betas))
        check_real("eps", self.eps)

    def init(self, matrix: Tensor) -> State:
        """Return ``exp_avg_sq`` (..., m, n), and ``exp_avg`` of the same shape unless b1 = 0."""
        state = {"exp_avg_sq": matrix.new_zeros(matrix.shape)}
        if self.betas[0]:
            state["exp_avg"] = matrix.new_zeros(matrix.shape)
        return state

    def observe(self, gradient: Tensor, state: State, context: Context) -> None:
        """Average the gradient and its squares."""
        b1, b2 = self.betas
        state["exp_avg_sq"].mul_(b2).addcmul_(gradient, gradient, value=1.0 - b2)
        if b1:
            state["exp_avg"].lerp_(gradient, 1.0 - b1)

    def precondition(self, gradient: Tensor, state: State, context: Context) -> Tensor:
        """Return G / (sqrt(V) + eps), shape (..., m, n)."""
        root = state["exp_avg_sq"].sqrt()
        if self.bias_correction:
            root.div_(math.sqrt(1.0 - self.betas[1] ** context.step))
        root.add_(self.eps)
        if self.eps:
            return gradient / root
        return torch.where(root > 0, gradient / root, 0.0)

    def __call__(self, update: Tensor, state: State, context: Context) -> Tensor:
        """Observe ``update`` and precondition the averaged gradient."""
        self.observe(update, state, context)
        b1 = self.betas[0]
        if not b1:
            return self.precondition(update, state, context)
        mean = state["exp_avg"]
        if self.bias_correction:
            mean = mean / (1.0 - b1**context.step)
        return self.precondition(mean, state, context)
