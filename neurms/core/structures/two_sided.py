"""S (x) Q with both factors diagonal: the structure of RACS."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neurms.compiled.two_sided import scaled_square_sum, two_sided_fit, two_sided_scales_
from neurms.core.ground.errors import check_fraction, check_positive_int
from neurms.core.structures.base import Context, State, Structure

__all__ = ["TwoSidedDiagonal"]


@dataclass(frozen=True)
class TwoSidedDiagonal(Structure):
    """F ~ S (x) Q with diagonal S over features and Q over units, averaged over steps.

    The update is G_ij / sqrt(q_i s_j) with exponential moving averages of s and q. Multiplying
    every gradient by a constant changes nothing: s takes the square of it, the quotient is free of
    it.

    Args:
        beta: Decay of the averages; 0 uses each step's own fit.
        iterations: Rounds of power iteration in each step.
        bias_correction: Divide the averages by 1 - beta^t. False is the paper: as the averages
            start from zero its first update is 1/(1 - beta) times as long.

    Reference:
        Structured-Fisher paper, Algorithm 1 and eq. 16 (RACS). Settled here: a row or a column
        whose statistic is zero gets a zero update, where the paper would divide by zero.
    """

    beta: float = 0.9
    iterations: int = 5
    bias_correction: bool = False
    row_local = True

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
        if context.shard is None:
            q, s = two_sided_fit(gradient, self.iterations)
        else:
            q, s = _fit_over_ranks(gradient, self.iterations, context)
        state["q"].lerp_(q, 1.0 - self.beta)
        state["s"].lerp_(s, 1.0 - self.beta)

    def precondition(self, gradient: Tensor, state: State, context: Context) -> Tensor:
        """Return G_ij / sqrt(q_i s_j), shape (..., m, n)."""
        left, right = self.factors(state, context.step)
        return gradient * left[..., :, None] * right[..., None, :]

    def factors(self, state: State, step: int) -> tuple[Tensor, Tensor]:
        """Return 1 / sqrt(q) (..., m) and 1 / sqrt(s) (..., n), zero where the statistic is."""
        return _rsqrt(state["q"]) * self._correction(step), _rsqrt(state["s"])

    def scales(
        self, gradient: Tensor, state: State, context: Context
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Observe one matrix G (m, n), and return its factors and the norm of the scaled G.

        Returns:
            What :meth:`factors` does, (m,) and (n,), and ``||left_i G_ij right_j||``, 0-d.
        """
        if context.shard is None:
            correction = self._correction(context.step)
            return two_sided_scales_(
                gradient, state["q"], state["s"], self.iterations, 1.0 - self.beta, correction
            )
        self.observe(gradient, state, context)
        left, right = self.factors(state, context.step)
        return left, right, context.summed(scaled_square_sum(gradient, left, right)).sqrt()

    def _correction(self, step: int) -> float:
        return 1.0 - self.beta**step if self.bias_correction else 1.0


def _fit_over_ranks(gradient: Tensor, iterations: int, context: Context) -> tuple[Tensor, Tensor]:
    """Fit q s^T as :func:`~neurms.compiled.two_sided.two_sided_fit` does, from a rank's rows of G.

    A round sends n + 1 numbers: (G.^2)^T q and ||q||^2 are sums over rows, the rest is at home.
    """
    squares = gradient.square()
    tiny = torch.finfo(squares.dtype).tiny
    q = squares.new_ones(squares.shape[:-1])
    for _ in range(iterations):
        products = (squares.mT @ q.unsqueeze(-1)).squeeze(-1)
        own = torch.cat([products, q.square().sum(-1, keepdim=True)], -1)
        sums = context.summed(own)
        s = sums[..., :-1] / sums[..., -1:].clamp(min=tiny)
        # ||s||^2 underflows long before s does, so s enters normalised by its largest entry.
        peak = s.amax(-1, keepdim=True).clamp(min=tiny)
        unit = s / peak
        norm = (unit.square().sum(-1, keepdim=True) * peak).clamp(min=tiny)
        q = (squares @ unit.unsqueeze(-1)).squeeze(-1) / norm
    return q, s


def _rsqrt(values: Tensor) -> Tensor:
    return torch.where(values > 0, values.rsqrt(), 0.0)
