"""R^(1/2) (x) L^(1/2): the structure of Shampoo."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neurms.compiled.products import product
from neurms.compiled.roots import inverse_root
from neurms.compiled.symmetric import add_gram_
from neurms.core.ground.errors import check_choice, check_fraction, check_positive_int, check_real
from neurms.core.structures.base import Context, State, Structure

__all__ = ["Kronecker", "is_due", "staggered"]


def is_due(step: int, interval: int) -> bool:
    """Whether something done at step 1 and every ``interval`` steps from then on is done now."""
    return (step - 1) % interval == 0


def staggered(context: Context, interval: int, stagger: bool) -> int:
    """Return a step number to ask :func:`is_due` of: with ``stagger`` a matrix's own, by its seed.

    Matrices then do at different steps what all would do at once; each still does it at its first
    step and every ``interval`` steps, but for the first time, which comes sooner. The seed is made
    of a parameter's name, so no order of parameters matters, and a resumed run goes on as it was.
    """
    if not stagger or context.step == 1:
        return context.step
    return context.step + context.seeds[0] % interval


@dataclass(frozen=True)
class Kronecker(Structure):
    """F ~ R^(1/2) (x) L^(1/2) with L = sum_t G_t G_t^T and R = sum_t G_t^T G_t.

    The update is L^(-1/4) G R^(-1/4), each factor with ``eps`` added to its eigenvalues. Both
    factors are summed (``beta`` = 1) or averaged and corrected for their start at zero (``beta`` <
    1). A matrix of one row (one column) has no use for a scalar L (R): it is preconditioned by
    R^(-1/2) (L^(-1/2)) alone, which is full-matrix AdaGrad.

    Args:
        beta: Decay of the factors; 1 sums them.
        eps: Added to the eigenvalues of L and R.
        interval: Steps between two computations of the roots. With 1 they are not kept.
        stagger: Compute the roots of different matrices at different steps; see
            :func:`staggered`. For single matrices, not for a batch of them.

    Reference:
        "Shampoo", Gupta et al., 2018, Algorithm 1; averages, bias correction, eps on the
        eigenvalues and exponents -1/2 over the number of sides above 1 as in Distributed Shampoo.
        Settled here: eigenvalues below rounding (d ulp of the largest) count as that much, since a
        gradient's rounding errors would else be blown up by eps^(-1/4).
    """

    beta: float = 1.0
    eps: float = 1e-6
    interval: int = 1
    stagger: bool = False

    def __post_init__(self) -> None:
        check_fraction("beta", self.beta, closed=True)
        check_real("eps", self.eps, strict=True)
        check_positive_int("interval", self.interval)
        check_choice("stagger", self.stagger, (True, False))

    def init(self, matrix: Tensor) -> State:
        """Return ``left`` (..., m, m) and ``right`` (..., n, n), and room for their roots."""
        batch, sides = matrix.shape[:-2], _sides(matrix)
        state = {side: matrix.new_zeros((*batch, d, d)) for side, d in sides.items()}
        if self.interval > 1:
            roots = {f"{side}_root": torch.zeros_like(factor) for side, factor in state.items()}
            state.update(roots)
        return state

    def observe(self, gradient: Tensor, state: State, context: Context) -> None:
        """Add G G^T and G^T G to the factors; compute their roots anew when due."""
        share = 1.0 if self.beta == 1.0 else 1.0 - self.beta
        step = staggered(context, self.interval, self.stagger)
        for side in _sides(gradient):
            facing = gradient if side == "left" else gradient.mT
            add_gram_(state[side], facing, self.beta, share)
            if f"{side}_root" in state and is_due(step, self.interval):
                state[f"{side}_root"].copy_(self._root(gradient, state[side], context.step))

    def precondition(self, gradient: Tensor, state: State, context: Context) -> Tensor:
        """Return L^(-1/4) G R^(-1/4), shape (..., m, n)."""
        update = gradient
        for side in _sides(gradient):
            root = state.get(f"{side}_root")
            if root is None:
                root = self._root(gradient, state[side], context.step)
            update = product(root, update) if side == "left" else product(update, root)
        return update

    def _root(self, gradient: Tensor, factor: Tensor, step: int) -> Tensor:
        correction = 1.0 if self.beta == 1.0 else 1.0 - self.beta**step
        return inverse_root(factor / correction, 2 * len(_sides(gradient)), self.eps)


def _sides(matrix: Tensor) -> dict[str, int]:
    """Return the lengths of the sides that get a factor: those above 1, else the right one."""
    m, n = matrix.shape[-2:]
    sides = {side: d for side, d in (("left", m), ("right", n)) if d > 1}
    return sides or {"right": n}
