"""Safeguards: transforms that bound an update, whatever structure it came from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neurms.core.errors import check_real
from neurms.core.structures.base import Context, State, Transform

__all__ = ["NormGrowthLimiter", "frobenius", "limited"]


def frobenius(matrix: Tensor) -> Tensor:
    """Return the Frobenius norm (...) of each matrix (..., m, n)."""
    return torch.linalg.vector_norm(matrix, dim=(-2, -1))


def limited(update: Tensor, phi: Tensor, gamma: float, step: int) -> Tensor:
    """Return ``update`` with its norm's growth bounded by ``gamma``; ``phi`` (...) advances in place.

    eta = gamma / max(||U|| / phi, gamma) from the second step on, else 1; phi <- eta ||U||. A ``phi``
    of 0 (nothing moved so far) counts as a first step: the formula would hold the layer still for ever.
    """
    norm = frobenius(update)
    if step == 1:
        phi.copy_(norm)
        return update
    fresh = phi == 0
    ratio = norm / torch.where(fresh, 1.0, phi)
    eta = torch.where(fresh, 1.0, gamma / ratio.clamp(min=gamma))
    phi.copy_(eta * norm)
    return update * eta[..., None, None]


@dataclass(frozen=True)
class NormGrowthLimiter(Transform):
    """Let the update's Frobenius norm grow by at most a factor ``gamma`` from step to step.

    Reference:
        "Fira", Chen et al., 2024; Algorithm 1, lines 9 and 10, of the structured-Fisher paper (RACS).
    """

    gamma: float = 1.01

    def __post_init__(self) -> None:
        check_real("gamma", self.gamma, low=1.0)

    def init(self, matrix: Tensor) -> State:
        """Return the last norm ``phi`` (...), 0 before the first step."""
        return {"phi": matrix.new_zeros(matrix.shape[:-2])}

    def __call__(self, update: Tensor, state: State, context: Context) -> Tensor:
        """Return the limited update (..., m, n)."""
        return limited(update, state["phi"], self.gamma, context.step)
