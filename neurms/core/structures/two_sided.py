"""S (x) Q with both factors diagonal: the structure of RACS."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neurms.core.errors import check_fraction, check_positive_int
from neurms.core.structures.base import Context, State, Structure

__all__ = ["TwoSidedDiagonal", "principal_scales"]


def principal_scales(gradient: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Return the rank-one fit q s^T of G.^2 by power iteration from q = 1.

    s = (G.^2)^T q / ||q||^2 and q = (G.^2) s / ||s||^2 in turn: up to scale the right and left principal
    singular vectors of G.^2, which are positive by Perron-Frobenius.

    Args:
        gradient: G, shape (..., m, n).
        iterations: Number of rounds, at least 1.

    Returns:
        q, shape (..., m), and s, shape (..., n); zero where a row or a column of G is.
    """
    squares = gradient.square()
    tiny = torch.finfo(squares.dtype).tiny
    s = squares.mean(-2)
    for rounds in range(iterations):
        if rounds:
            s = _mv(squares.mT, q) / q.square().sum(-1, keepdim=True).clamp(min=tiny)
        # ||s||^2 underflows long before s does, so s enters normalised by its largest entry.
        peak = s.amax(-1, keepdim=True).clamp(min=tiny)
        unit = s / peak
        q = _mv(squares, unit) / (unit.square().sum(-1, keepdim=True) * peak).clamp(min=tiny)
    return q, s


@dataclass(frozen=True)
class TwoSidedDiagonal(Structure):
    """F ~ S (x) Q with diagonal S over features and Q over units, averaged over steps.

    The update is G_ij / sqrt(q_i s_j) with exponential moving averages of s and q. Multiplying every
    gradient by a constant changes nothing: s takes the square of it, the quotient is free of it.

    Args:
        beta: Decay of the averages; 0 uses each step's own fit.
        iterations: Rounds of power iteration in each step.
        bias_correction: Divide the averages by 1 - beta^t. False is the paper: as the averages start
            from zero its first update is 1/(1 - beta) times as long.

    Reference:
        Structured-Fisher paper, Algorithm 1 and eq. 16 (RACS). Settled here: a row or a column whose
        statistic is zero gets a zero update, where the paper would divide by zero.
    """

    beta: float = 0.9
    iterations: int = 5
    bias_correction: bool = False

    def __post_init__(self) -> None:
        check_fraction("beta", self.beta)
        check_positive_int("iterations", self.iterations)

    def init(self, matrix: Tensor) -> State:
        """Return the averages ``q`` (..., m) and ``s`` (..., n), zero."""
        return {
            "q": matrix.new_zeros(matrix.shape[:-1]),
            "s": matrix.new_zeros((*matrix.shape[:-2], matrix.shape[-1])),
        }

    def observe(self, gradient: Tensor, state: State, context: Context) -> None:
        """Average this step's principal scales into ``q`` and ``s``."""
        q, s = principal_scales(gradient, self.iterations)
        state["q"].lerp_(q, 1.0 - self.beta)
        state["s"].lerp_(s, 1.0 - self.beta)

    def precondition(self, gradient: Tensor, state: State, context: Context) -> Tensor:
        """Return G_ij / sqrt(q_i s_j), shape (..., m, n)."""
        correction = 1.0 - self.beta**context.step if self.bias_correction else 1.0
        return gradient * (_rsqrt(state["q"])[..., :, None] * correction) * _rsqrt(state["s"])[..., None, :]


def _rsqrt(values: Tensor) -> Tensor:
    return torch.where(values > 0, values.rsqrt(), 0.0)


def _mv(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None])[..., 0]
