"""S (x) Q with both factors diagonal: the structure of RACS."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from neurms.compiled.backends import PROMPT, current_backend
from neurms.compiled.lists import entries
from neurms.compiled.native import LEAST_ELEMENTS
from neurms.compiled.two_sided import scaled_square_sum, two_sided_fit, two_sided_scales
from neurms.compiled.two_sided_once import fit_once, tracked_start, two_sided_once
from neurms.compiled.two_sided_steps import TRACKED
from neurms.core.ground.errors import check_choice, check_fraction, check_positive_int
from neurms.core.ground.sums import Summing
from neurms.core.structures.base import Context, State, Structure

__all__ = ["Fit", "Scales", "TwoSidedDiagonal"]

Fit = Literal["power", "tracked", "sums"]
Scales = tuple[Tensor, Tensor, Tensor]
"""left (m,), right (n,), and ``||left_i G_ij right_j||``, 0-d."""


@dataclass(frozen=True)
class TwoSidedDiagonal(Structure):
    """F ~ S (x) Q with diagonal S over features and Q over units, averaged over steps.

    The update is G_ij / sqrt(q_i s_j) with exponential moving averages of s and q. Multiplying
    every gradient by a constant changes nothing: one of them takes the square of it, the quotient
    is free of it. Where q and s come from, in each step:

    - ``fit="power"``: ``iterations`` rounds of power iteration on G.^2 from q = 1;
    - ``"tracked"``: one round, from the average s over its mean (from s = 1 in the first step):
      what the rounds would find changes slowly, and each step comes nearer to it;
    - ``"sums"``: the means of G.^2 over columns and over rows, no iteration. The update is then
      G_ij sqrt(T / (q_i s_j)) with T the mean of s, the fit of Adafactor.

    Args:
        beta: Decay of the averages; 0 uses each step's own fit.
        iterations: Rounds of power iteration in each step, for ``fit="power"``.
        bias_correction: Divide the averages by 1 - beta^t. False is the paper: as the averages
            start from zero its first update is 1/(1 - beta) times as long (the root of that for
            ``"sums"``).
        fit: See above.

    Reference:
        Structured-Fisher paper, Algorithm 1 and eq. 16 (RACS), is ``"power"``. Settled here: a row
        or a column whose statistic is zero gets a zero update, where the paper would divide by
        zero. The other fits are additions, which read G once where the paper's reads it five times.
    """

    beta: float = 0.9
    iterations: int = 5
    bias_correction: bool = False
    fit: Fit = "power"
    row_local = True

    def __post_init__(self) -> None:
        check_fraction("beta", self.beta)
        check_positive_int("iterations", self.iterations)
        check_choice("fit", self.fit, ("power", "tracked", "sums"))

    @property
    def rounds(self) -> int:
        """The fit, as :func:`~neurms.compiled.two_sided_steps.two_sided_steps_` takes it."""
        return {"power": self.iterations, "tracked": TRACKED, "sums": 0}[self.fit]

    def init(self, matrix: Tensor) -> State:
        """Return the averages ``q`` (..., m) and ``s`` (..., n), zero."""
        return {
            "q": matrix.new_zeros(matrix.shape[:-1]),
            "s": matrix.new_zeros((*matrix.shape[:-2], matrix.shape[-1])),
        }

    def observe(self, gradient: Tensor, state: State, context: Context) -> None:
        """Average this step's fit into ``q`` and ``s``."""
        context.finished(self._observing(gradient, state, context))

    def _observing(self, gradient: Tensor, state: State, context: Context) -> Summing[None]:
        tracked = self.fit == "tracked"
        if self.fit != "power" and context.shard is None:
            q, s = fit_once(gradient, state["s"], tracked)
        elif self.fit != "power":
            q, s = yield from _fit_once_over_rows(gradient, state["s"], tracked, context)
        elif context.shard is None:
            q, s = two_sided_fit(gradient, self.iterations)
        else:
            q, s = yield from _fit_over_rows(gradient, self.iterations)
        state["q"].lerp_(q, 1.0 - self.beta)
        state["s"].lerp_(s, 1.0 - self.beta)

    def summing(self, update: Tensor, state: State, context: Context) -> Summing[Tensor]:
        """Observe the gradient, a sum over rows for each round, and return it preconditioned."""
        yield from self._observing(update, state, context)
        return self.precondition(update, state, context)

    def precondition(self, gradient: Tensor, state: State, context: Context) -> Tensor:
        """Return G_ij / sqrt(q_i s_j), shape (..., m, n)."""
        left, right = self.factors(state, context.step)
        return gradient * left[..., :, None] * right[..., None, :]

    def factors(self, state: State, step: int) -> tuple[Tensor, Tensor]:
        """Return sqrt(T / q) (..., m) and 1 / sqrt(s) (..., n), zero where the statistic is.

        T is 1 unless ``fit="sums"``.
        """
        left = _rsqrt(state["q"]) * self.correction(step)
        if self.fit == "sums":
            left = left * state["s"].mean(-1, keepdim=True).sqrt()
        return left, _rsqrt(state["s"])

    def scales(
        self, gradients: Sequence[Tensor], states: Sequence[State], steps: Sequence[int]
    ) -> list[Scales]:
        """Observe whole matrices G (m, n), and return the factors and the norm of each scaled G.

        Returns:
            What :meth:`factors` does, (m,) and (n,), and ``||left_i G_ij right_j||``, 0-d.
        """
        corrections = [self.correction(step) for step in steps]
        q, s = [state["q"] for state in states], [state["s"] for state in states]
        if self.fit == "power":
            backend, size = current_backend(), entries(gradients)
            # Small matrices natively, too, where there are many.
            prompt = backend == "auto" and size >= LEAST_ELEMENTS
            move = two_sided_scales.on(PROMPT if prompt else backend)
            made = move(gradients, q, s, corrections, self.iterations, 1.0 - self.beta)
        else:
            made = two_sided_once(gradients, q, s, corrections, self.beta, self.fit == "tracked")
        new_q, new_s, *rest = made
        torch._foreach_copy_([*q, *s], [*new_q, *new_s])
        return list(zip(*rest, strict=True))

    def scaling(self, gradient: Tensor, state: State, context: Context) -> Summing[Scales]:
        """Observe a rank's rows of G, and return what :meth:`scales` does, left for the rows."""
        yield from self._observing(gradient, state, context)
        left, right = self.factors(state, context.step)
        square = yield scaled_square_sum(gradient, left, right)
        return left, right, square.sqrt()

    def correction(self, step: int) -> float:
        """Return the factor of ``left`` that corrects the averages' start from zero."""
        if not self.bias_correction:
            return 1.0
        # With the averages over c, sqrt((T / c) / ((q_i / c) (s_j / c))) for "sums".
        whole = 1.0 - self.beta**step
        return math.sqrt(whole) if self.fit == "sums" else whole


def _fit_over_rows(gradient: Tensor, iterations: int) -> Summing[tuple[Tensor, Tensor]]:
    """Fit q s^T as :func:`~neurms.compiled.two_sided.two_sided_fit` does, from a rank's rows of G.

    A round sends n + 1 numbers: (G.^2)^T q and ||q||^2 are sums over rows, the rest is at home.
    Rounds cannot share one exchange: q of the next is made of sums over all rows. Only
    (G.^2)^T G.^2 would serve them all, n^2 numbers, which is more than G where m < n.
    """
    squares = gradient.square()
    tiny = torch.finfo(squares.dtype).tiny
    q = squares.new_ones(squares.shape[:-1])
    for _ in range(iterations):
        products = (squares.mT @ q.unsqueeze(-1)).squeeze(-1)
        sums = yield torch.cat([products, q.square().sum(-1, keepdim=True)], -1)
        s = sums[..., :-1] / sums[..., -1:].clamp(min=tiny)
        # ||s||^2 underflows long before s does, so s enters normalised by its largest entry.
        peak = s.amax(-1, keepdim=True).clamp(min=tiny)
        unit = s / peak
        norm = (unit.square().sum(-1, keepdim=True) * peak).clamp(min=tiny)
        q = (squares @ unit.unsqueeze(-1)).squeeze(-1) / norm
    return q, s


def _fit_once_over_rows(
    gradient: Tensor, s: Tensor, tracked: bool, context: Context
) -> Summing[tuple[Tensor, Tensor]]:
    """Fit as :func:`~neurms.compiled.two_sided_once.fit_once` does, from a rank's rows of G.

    It sends n numbers, and one more where ``tracked``, for ||q||^2.
    """
    squares = gradient.square()
    if not tracked:
        # Divided first: a sum over all ranks could overflow where the mean does not.
        total = yield squares.sum(-2) / context.units(gradient)
        return squares.mean(-1), total
    start = tracked_start(s)
    q = (squares @ start.unsqueeze(-1)).squeeze(-1) / start.square().sum(-1, keepdim=True)
    # In float64: a rank does not know by which of all rows to normalise.
    wide = q.double()
    products = (squares.mT.double() @ wide.unsqueeze(-1)).squeeze(-1)
    sums = yield torch.cat([products, wide.square().sum(-1, keepdim=True)], -1)
    tiny = torch.finfo(torch.float64).tiny
    return q, (sums[..., :-1] / sums[..., -1:].clamp(min=tiny)).to(q.dtype)


def _rsqrt(values: Tensor) -> Tensor:
    return torch.where(values > 0, values.rsqrt(), 0.0)
