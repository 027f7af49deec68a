"""Diag_B(U D_i U^T): one eigenbasis over units, a diagonal of its own for every feature."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neurms.compiled.bases import descending_eigenvectors, noise_floor
from neurms.compiled.products import product
from neurms.compiled.symmetric import add_gram_
from neurms.core.ground.errors import check_betas, check_positive_int, check_real
from neurms.core.structures.base import Context, State, Structure

__all__ = ["EigenBasis", "alive", "due"]


def due(step: int, interval: int) -> bool:
    """Return whether a basis is renewed in this step: the first one and every ``interval``-th."""
    return step == 1 or step % interval == 0


def alive(covariance: Tensor) -> Tensor:
    """Return 1 for each row that ever had a gradient, else 0: shape (..., d) from (..., d, d)."""
    return (covariance.diagonal(dim1=-2, dim2=-1) > 0).to(covariance.dtype)


@dataclass(frozen=True)
class EigenBasis(Structure):
    """F ~ Diag_B(U D_1 U^T, ..., U D_n U^T): Adam in the eigenbasis of E[G G^T].

    Q <- b3 Q + (1 - b3) G G^T ; U = eigh(Q) at t = 1 and every ``interval`` steps ;
    M <- b1 M + (1 - b1) G ; V <- b2 V + (1 - b2) (U^T G).^2 ; update U ((U^T M) / (sqrt(V) + eps)).
    M lives in the full space, so a new U needs no care for it; V is not rotated. State for an m x n
    matrix: 2 mn + 2 m^2 numbers, mn less for b1 = 0.

    Args:
        betas: b1, b2 and b3, all in [0, 1); with b1 = 0 no M is kept.
        interval: Steps from one eigendecomposition to the next.
        eps: Added to the root.
        transpose_tall: Work on G^T where m > n, so that Q is min(m, n) wide. Another structure: the
            eigenbasis is then one over features.

    Raises:
        ValueError: A setting is out of its range.

    Reference:
        Structured-Fisher paper, Algorithm 7 (Eigen-Adam; known as AdaDiag and one-sided
        SOAP). The paper corrects no average for its start at zero, nor does this. Settled here: a
        rotated entry whose mean square is rounding noise beside its column's energy gets no update,
        as the null space of a rank-deficient Q holds nothing else, nor does a unit that never had a
        gradient.

    Example:
        >>> import torch
        >>> structure = EigenBasis(betas=(0.0, 0.0, 0.0), eps=0.0)
        >>> gradient = torch.tensor([[3.0, 0.0], [0.0, 0.5]])
        >>> structure(gradient, structure.init(gradient), Context(step=1))
        tensor([[1., 0.],
                [0., 1.]])
    """

    betas: tuple[float, float, float] = (0.9, 0.999, 0.999)
    interval: int = 10
    eps: float = 1e-8
    transpose_tall: bool = False

    def __post_init__(self) -> None:
        check_betas("betas", self.betas, 3)
        check_positive_int("interval", self.interval)
        check_real("eps", self.eps)

    def init(self, matrix: Tensor) -> State:
        """Return both moments like G, and ``covariance`` and ``basis`` (..., m, m)."""
        matrix = self._wide(matrix)
        square = (*matrix.shape[:-1], matrix.shape[-2])
        state = {"exp_avg": matrix.new_zeros(matrix.shape)} if self.betas[0] else {}
        return state | {
            "exp_avg_sq": matrix.new_zeros(matrix.shape),
            "covariance": matrix.new_zeros(square),
            "basis": matrix.new_zeros(square),
        }

    def observe(self, gradient: Tensor, state: State, context: Context) -> None:
        """Average Q, renew U when it is due, and average M and the squares of U^T G."""
        gradient = self._wide(gradient)
        b1, b2, b3 = self.betas
        add_gram_(state["covariance"], gradient, b3, 1.0 - b3)
        if due(context.step, self.interval):
            state["basis"].copy_(descending_eigenvectors(state["covariance"]))
        rotated = product(state["basis"].mT, gradient)
        state["exp_avg_sq"].mul_(b2).addcmul_(rotated, rotated, value=1.0 - b2)
        if b1:
            state["exp_avg"].lerp_(gradient, 1.0 - b1)

    def precondition(self, gradient: Tensor, state: State, context: Context) -> Tensor:
        """Return U ((U^T G) / (sqrt(V) + eps)), shape (..., m, n)."""
        return self._back(self._preconditioned(self._wide(gradient), state), gradient)

    def __call__(self, update: Tensor, state: State, context: Context) -> Tensor:
        """Observe ``update`` and precondition M."""
        self.observe(update, state, context)
        mean = state["exp_avg"] if self.betas[0] else self._wide(update)
        return self._back(self._preconditioned(mean, state), update)

    def _preconditioned(self, mean: Tensor, state: State) -> Tensor:
        basis, squares = state["basis"], state["exp_avg_sq"]
        scaled = product(basis.mT, mean).div_(squares.sqrt().add_(self.eps))
        update = product(basis, torch.where(squares > noise_floor(squares), scaled, 0.0))
        return update.mul_(alive(state["covariance"])[..., :, None])

    def _wide(self, matrix: Tensor) -> Tensor:
        return matrix.mT if self._flips(matrix) else matrix

    def _back(self, wide: Tensor, like: Tensor) -> Tensor:
        return wide.mT if self._flips(like) else wide

    def _flips(self, matrix: Tensor) -> bool:
        return self.transpose_tall and matrix.shape[-2] > matrix.shape[-1]
