"""S (x) M with a diagonal S over features and a full M over units."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neurms.compiled.roots import eigh
from neurms.core.ground.errors import check_fraction, check_positive_int, check_real
from neurms.core.structures.base import Context, State, Structure

__all__ = ["ScaledFull"]


@dataclass(frozen=True)
class ScaledFull(Structure):
    """F ~ S (x) M: every feature has the same m x m block over units but for a factor s_j.

    With the j-th column g_j of one step's G, the fit that is best in Frobenius norm is a fixed
    point of

        M = sum_j s_j g_j g_j^T / ||s||^2          s_j = g_j^T M g_j / ||M||_F^2

    which ``iterations`` rounds approach from s = 1. Both are averaged over steps, and the update is
    M^(-1/2) G S^(-1/2). Between whitening (S = I) and RACS (M diagonal). Multiplying every gradient
    by a constant changes nothing. State: m^2 + n numbers.

    Args:
        beta: Decay of the averages; 0 uses each step's own fit.
        iterations: Rounds of the fixed point in each step.
        bias_correction: Divide both averages by 1 - beta^t.
        eps: Added to M's eigenvalues, as a share of the largest.

    Raises:
        ValueError: A setting is out of its range.

    Reference:
        Structured-Fisher paper, Theorem D.1, with E[.] of one step at a time and averages as in
        RACS. Settled here: ``eps``, as M is singular where m > n; a feature whose statistic is zero
        gets a zero update.

    Example:
        >>> import torch
        >>> structure = ScaledFull(beta=0.0)
        >>> gradient = torch.tensor([[3.0, 0.0], [0.0, 3.0]])
        >>> structure(gradient, structure.init(gradient), Context(step=1))
        tensor([[1.4142, 0.0000],
                [0.0000, 1.4142]])
    """

    beta: float = 0.9
    iterations: int = 5
    bias_correction: bool = True
    eps: float = 1e-6

    def __post_init__(self) -> None:
        check_fraction("beta", self.beta)
        check_positive_int("iterations", self.iterations)
        check_real("eps", self.eps, strict=True)

    def init(self, matrix: Tensor) -> State:
        """Return the averages ``block`` (..., m, m) and ``s`` (..., n), zero."""
        *batch, m, n = matrix.shape
        return {"block": matrix.new_zeros((*batch, m, m)), "s": matrix.new_zeros((*batch, n))}

    def observe(self, gradient: Tensor, state: State, context: Context) -> None:
        """Average this step's fit into ``block`` and ``s``."""
        block, s = scaled_full_fit(gradient, self.iterations)
        state["block"].lerp_(block, 1.0 - self.beta)
        state["s"].lerp_(s, 1.0 - self.beta)

    def precondition(self, gradient: Tensor, state: State, context: Context) -> Tensor:
        """Return M^(-1/2) G S^(-1/2), shape (..., m, n)."""
        correction = 1.0 - self.beta**context.step if self.bias_correction else 1.0
        values, vectors = eigh(state["block"])
        values = values.clamp(min=0.0) + self.eps * values[..., -1:]
        roots = torch.where(values > 0, values.rsqrt(), 0.0) * correction
        scales = torch.where(state["s"] > 0, state["s"].rsqrt(), 0.0)
        turned = vectors.mT @ (gradient * scales[..., None, :])
        return vectors @ (turned * roots[..., :, None])


def scaled_full_fit(gradient: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Return M (..., m, m) and s (..., n) of the best S (x) M for one gradient (..., m, n).

    The gradient enters in units of its largest entry, whose square M takes back at the end: fourth
    powers stay in range. M and s are zero for a zero gradient.
    """
    peak = gradient.abs().amax((-2, -1), keepdim=True)
    scaled = gradient / torch.where(peak > 0, peak, 1.0)
    s = torch.ones_like(scaled[..., 0, :])
    block = scaled.new_zeros((*scaled.shape[:-1], scaled.shape[-2]))
    for _ in range(iterations):
        block = (scaled * _over_square(s)[..., None, :]) @ scaled.mT
        s = (scaled * (block @ scaled)).sum(-2)
        s = s / _norm_square(block.flatten(-2))[..., None]
    return block * peak.square(), s


def _norm_square(vector: Tensor) -> Tensor:
    square = vector.square().sum(-1)
    return torch.where(square > 0, square, 1.0)


def _over_square(vector: Tensor) -> Tensor:
    return vector / _norm_square(vector)[..., None]
