"""Orthonormal bases: eigenvectors, singular vectors, subspace iteration, draws from a complement.

Plain functions of tensors, batched over leading axes, that end in LAPACK calls and run the same on
every backend. None forms a d x d matrix for a space of d dimensions unless it is given one, but for
:func:`leading_basis`, whose d x d matrix is no larger than its gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neurms.compiled.products import product
from neurms.compiled.roots import eigh, positive_qr

__all__ = [
    "complement_frame",
    "descending_eigenvectors",
    "leading_basis",
    "noise_floor",
    "orthogonal_iteration",
    "singular_basis",
    "subspace_iteration",
]

NOISE = 16.0
"""Rounding errors of a rotated vector, in ulps of its norm, that may add up in its coordinates."""
LEAK = 4.0
"""Errors of a computed eigenvector along another one, in ulps of lambda_1 / lambda_l."""
DROP = 0.1
"""Share of the next larger row's energy below which a row may belong to a null space."""


def noise_floor(squares: Tensor) -> Tensor:
    """Return the mean square (..., r, n) below which a rotated coordinate is rounding noise.

    A method that divides by a coordinate's own size would blow noise up to full updates, and there
    are two kinds of it:

    - A rotation mixes the entries of a column, so every coordinate inherits an error of a few ulps
      of the column's norm.
    - A direction of the null space inherits more: computed eigenvectors are off by ulp lambda_1 /
      lambda_l along the l-th one, which leaves (ulp lambda_1)^2 sum_l 1 / lambda_l of energy in a
      row that should be zero. Rows are taken for such a null space from the first one on that holds
      less than 16 times that and less than a tenth of the next larger row. Without the drop, small
      rows of a decaying spectrum would be lost: they mix with each other, but hold no noise.

    Row sums of the squares stand in for the eigenvalues.

    Args:
        squares: Mean squares of the coordinates, columns along axis -2, shape (..., r, n).

    Returns:
        The floor, infinite in the rows of a null space.

    Example:
        >>> import torch
        >>> noise_floor(torch.tensor([[4.0], [4e-8], [4e-15]])).isinf().ravel()
        tensor([False, False,  True])
    """
    ulp = torch.finfo(squares.dtype).eps
    energy, order = squares.sum(-1).sort(dim=-1, descending=True)
    top = energy[..., :1]
    shares = torch.where(energy > 0, top / energy, 0.0).cumsum(-1)
    leak = torch.cat([torch.zeros_like(top), shares[..., :-1]], dim=-1) * top * (LEAK * ulp) ** 2
    larger = torch.cat([top, energy[..., :-1]], dim=-1)
    begun = ((energy < leak) & (energy < DROP * larger)).cumsum(-1) > 0
    null = torch.empty_like(begun).scatter_(-1, order, begun)
    rounding = squares.sum(-2, keepdim=True) * (NOISE * ulp) ** 2
    return torch.where(null[..., None], torch.inf, rounding)


def descending_eigenvectors(matrix: Tensor) -> Tensor:
    """Return the eigenvectors (..., d, d) of symmetric matrices, largest eigenvalue first.

    Computed in float64: float32's routine is off by ulp lambda_1 in every entry, which loses the
    small eigenvectors of matrices whose rows differ in scale, at half of the time.
    """
    return eigh(matrix.double())[1].flip(-1).to(matrix.dtype)


def leading_basis(gradient: Tensor, rank: int) -> Tensor:
    """Return the ``rank`` leading eigenvectors (..., m, rank) of G G^T.

    Args:
        gradient: G, shape (..., m, n).
        rank: At most min(m, n).
    """
    if gradient.shape[-2] <= gradient.shape[-1]:
        return descending_eigenvectors(product(gradient, gradient.mT))[..., :rank]
    return singular_basis(gradient, rank)


def singular_basis(gradient: Tensor, rank: int, *, right: bool = False) -> Tensor:
    """Return the ``rank`` leading left (..., m, rank) or right (..., n, rank) singular vectors."""
    left, _, right_rows = _svd(gradient)
    return right_rows[..., :rank, :].mT if right else left[..., :rank]


def subspace_iteration(
    gradient: Tensor, basis: Tensor, tracked: Tensor | None, decay: float
) -> Tensor:
    """Return the basis after one round on Q = decay U Qr U^T + (1 - decay) G G^T, never forming Q.

    H = orth(Q U), E the eigenvectors of H^T Q H with the largest eigenvalue first: U' = H E.

    Args:
        gradient: G, shape (..., m, n).
        basis: U, shape (..., m, r), of any columns.
        tracked: Qr, shape (..., r, r), or None where ``decay`` is 0.
        decay: Weight of the tracked part.

    Returns:
        U', orthonormal columns, shape (..., m, r).
    """
    image = (1.0 - decay) * product(gradient, product(gradient.mT, basis))
    if tracked is not None:
        image = image + decay * (basis @ (tracked @ (basis.mT @ basis)))
    return ritz_basis(torch.linalg.qr(image)[0], gradient, basis, tracked, decay)


def ritz_basis(
    frame: Tensor, gradient: Tensor, basis: Tensor, tracked: Tensor | None, decay: float
) -> Tensor:
    """Return H E, where E holds the eigenvectors of H^T Q H for H = ``frame`` (..., m, r)."""
    seen = product(frame.mT, gradient)
    core = (1.0 - decay) * product(seen, seen.mT)
    if tracked is not None:
        inside = frame.mT @ basis
        core = core + decay * (inside @ tracked @ inside.mT)
    return frame @ descending_eigenvectors(core)


def orthogonal_iteration(covariance: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return orth(A Q) after sorting Q's columns by their Rayleigh quotients, and that order.

    Args:
        covariance: A, symmetric, shape (..., d, d).
        basis: Q, shape (..., d, d).

    Returns:
        The new basis (..., d, d) and the columns' order (..., d), largest quotient first.
    """
    image = product(covariance, basis)
    order = (basis * image).sum(-2).argsort(-1, descending=True)
    picked = order[..., None, :].expand(image.shape)
    return torch.linalg.qr(image.gather(-1, picked))[0], order


def complement_frame(basis: Tensor, draws: Tensor) -> Tensor:
    """Return orthonormal columns, uniform in the orthogonal complement of a basis.

    Independent normal numbers, projected on the complement, are rotation-invariant there, and so is
    their QR factor with a positive diagonal. Projecting twice removes what rounding leaves of the
    first projection.

    Args:
        basis: U, orthonormal columns, shape (..., m, l).
        draws: Independent normal numbers, shape (..., m, k) with k <= m - l.

    Returns:
        Shape (..., m, k).
    """
    for _ in range(2):
        draws = positive_qr(draws - basis @ (basis.mT @ draws))[0]
    return draws


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    try:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        if matrix.dtype == torch.float64:
            raise
        left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return left.to(matrix.dtype), values.to(matrix.dtype), right.to(matrix.dtype)
