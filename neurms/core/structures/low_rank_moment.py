"""Diag(V) with V held as a product of two thin factors: the structure of Adapprox."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neurms.compiled.roots import randomized_svd
from neurms.core.ground.errors import check_fraction, check_positive_int, check_real
from neurms.core.structures.base import Context, State, Structure

__all__ = ["LowRankMoment"]


@dataclass(frozen=True)
class LowRankMoment(Structure):
    """F ~ Diag(V) where only V's rank-k fit Q U^T outlives a step.

    V = beta max(Q U^T, 0) + (1 - beta) G.^2, the update is G / (sqrt(V) + eps) with this V, and Q,
    U become its best rank-k factors, found by randomized subspace iteration.

    Args:
        rank: k; reduced to min(m, n) for matrices with a shorter side.
        beta: Decay of the second moment.
        eps: Added to sqrt(V).
        iterations: Rounds of subspace iteration.
        oversampling: Columns drawn beyond k.

    Reference:
        "Adapprox", Zhao et al., 2024, Algorithm 3 with the S-RSI of its Algorithm 1. Departures:
        the rank is fixed (state keeps its shape for the whole run), the factors are cut by a small
        SVD instead of by dropping columns, and entries of Q U^T that come out negative count as
        zero. No bias correction, as in the paper.
    """

    rank: int = 32
    beta: float = 0.999
    eps: float = 1e-8
    iterations: int = 5
    oversampling: int = 5

    def __post_init__(self) -> None:
        check_positive_int("rank", self.rank)
        check_fraction("beta", self.beta)
        check_real("eps", self.eps, strict=True)
        check_positive_int("iterations", self.iterations, low=0)
        check_positive_int("oversampling", self.oversampling, low=0)

    def init(self, matrix: Tensor) -> State:
        """Return Q (..., m, k) and U (..., n, k), zero."""
        *batch, m, n = matrix.shape
        k = min(self.rank, m, n)
        return {
            "left": matrix.new_zeros((*batch, m, k)),
            "right": matrix.new_zeros((*batch, n, k)),
        }

    def observe(self, gradient: Tensor, state: State, context: Context) -> None:
        """Factorise this step's V into Q U^T."""
        self._factorise(self._moment(gradient, state), state, context)

    def precondition(self, gradient: Tensor, state: State, context: Context) -> Tensor:
        """Return G / (sqrt(Q U^T) + eps): what the factors alone know of V."""
        return gradient / (_product(state).sqrt() + self.eps)

    def __call__(self, update: Tensor, state: State, context: Context) -> Tensor:
        """Return G / (sqrt(V) + eps) with V before its truncation, as in the paper."""
        moment = self._moment(update, state)
        self._factorise(moment, state, context)
        return update / moment.sqrt_().add_(self.eps)

    def _moment(self, gradient: Tensor, state: State) -> Tensor:
        return torch.addcmul(
            _product(state).mul_(self.beta), gradient, gradient, value=1.0 - self.beta
        )

    def _factorise(self, moment: Tensor, state: State, context: Context) -> None:
        *batch, m, n = moment.shape
        k = state["left"].shape[-1]
        columns = min(k + self.oversampling, m, n)
        draws = [
            torch.randn(
                n, columns, generator=context.generator(i), dtype=torch.float32, device="cpu"
            )
            for i in range(moment[..., 0, 0].numel())
        ]
        omega = torch.stack(draws).reshape(*batch, n, columns).to(moment)
        left, right = randomized_svd(moment, omega, k, self.iterations)
        state["left"].copy_(left)
        state["right"].copy_(right)


def _product(state: State) -> Tensor:
    return (state["left"] @ state["right"].mT).clamp_(min=0.0)
