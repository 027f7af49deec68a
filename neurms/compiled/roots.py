"""Roots of symmetric matrices and the sketches that stand in for them.

Plain functions of tensors, batched over leading axes. They end in LAPACK calls, so there is nothing
for a backend to fuse and they run the same on every backend.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neurms.compiled.products import product

__all__ = [
    "damped_power",
    "eigenvalues",
    "eigh",
    "frequent_directions",
    "inverse_root",
    "orthonormal",
    "positive_qr",
    "randomized_svd",
    "relative_floor",
]


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, ascending, and eigenvectors of symmetric matrices.

    Each matrix is scaled by a power of two, which is exact, to entries of about 1, and float32
    input that LAPACK cannot diagonalise is tried again in float64. MKL's float32 routine does not
    always say so: on a singular 32 x 32 block with entries of 1e-8 it returned NaN and success.

    Args:
        matrix: Shape (..., d, d), symmetric; only the lower triangle is read.

    Returns:
        Eigenvalues (..., d) and eigenvectors in the columns of (..., d, d), in the input's dtype.

    Raises:
        torch.linalg.LinAlgError: The float64 attempt failed too, as with NaN input.
    """
    if matrix.numel() == 0:
        return matrix.new_zeros(matrix.shape[:-1]), torch.zeros_like(matrix)
    peak = torch.linalg.vector_norm(matrix.flatten(-2), torch.inf, -1)
    exponent = torch.frexp(peak).exponent.clamp(-120, 120)
    # Powers of two from ldexp, then a product: on whole matrices ldexp costs a fifth of LAPACK.
    scaled = matrix * torch.ldexp(torch.ones_like(peak), -exponent)[..., None, None]
    found = _lapack_eigh(scaled)
    if found is None:
        found = torch.linalg.eigh(scaled.double())
    values, vectors = (part.to(matrix.dtype) for part in found)
    return torch.ldexp(values, exponent[..., None]), vectors


def _lapack_eigh(matrix: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return eigenvalues and eigenvectors, or None where float64 may do what float32 cannot."""
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        if matrix.dtype == torch.float64:
            raise
        return None
    # Eigenvectors' entries are at most 1: their sum is finite where all of them are.
    finite = bool(values.isfinite().all()) and bool(vectors.sum().isfinite())
    return (values, vectors) if finite or matrix.dtype == torch.float64 else None


def eigenvalues(matrix: Tensor) -> Tensor:
    """Return eigenvalues (..., d), ascending, of symmetric matrices (..., d, d).

    A third of the time of :func:`eigh` for batches of small matrices, with its second attempt.
    """
    try:
        found = torch.linalg.eigvalsh(matrix)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return eigh(matrix)[0]
    return found if bool(found.isfinite().all()) else eigh(matrix)[0]


def relative_floor(values: Tensor) -> Tensor:
    """Return what rounding may turn a zero eigenvalue into: d ulp max(values), shape (..., 1).

    An eigenvalue below it is noise, and its inverse root would blow rounding errors of the gradient
    up to the size of an update.
    """
    ulp = torch.finfo(values.dtype).eps
    return values.amax(-1, keepdim=True).clamp(min=0.0) * (ulp * values.shape[-1])


def damped_power(values: Tensor, exponent: float, eps: float) -> Tensor:
    """Return (max(values, floor) + eps)^exponent for eigenvalues (..., d), floor by rounding."""
    return (torch.maximum(values, relative_floor(values)) + eps).pow(exponent)


def inverse_root(matrix: Tensor, root: int, eps: float) -> Tensor:
    """Return (A + eps I)^(-1/root) of positive semi-definite matrices.

    Args:
        matrix: A, shape (..., d, d).
        root: 2 for the inverse square root, 4 for the inverse fourth root.
        eps: Added to every eigenvalue; positive where A may be singular.

    Returns:
        The inverse roots, shape (..., d, d), symmetric.

    Example:
        >>> import torch
        >>> inverse_root(torch.diag(torch.tensor([4.0, 16.0])), 2, eps=0.0)
        tensor([[0.5000, 0.0000],
                [0.0000, 0.2500]])
    """
    values, vectors = eigh(matrix)
    return product(vectors * damped_power(values, -1.0 / root, eps)[..., None, :], vectors.mT)


def positive_qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the QR factors of (..., d, c) with a diagonal of R that is not negative.

    That makes the factors of a matrix of full rank unique, so that Q's rows follow when the
    matrix's rows are permuted; directions that it lacks are filled up by Householder's completion.

    Returns:
        Q, orthonormal columns, (..., d, min(d, c)), and R, (..., min(d, c), c).
    """
    basis, triangle = torch.linalg.qr(matrix)
    signs = torch.where(triangle.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(matrix.dtype)
    return basis * signs[..., None, :], triangle * signs[..., :, None]


def orthonormal(matrix: Tensor) -> Tensor:
    """Return the Q factor (..., d, k) of :func:`positive_qr` of (..., d, k), k <= d."""
    return positive_qr(matrix)[0]


def frequent_directions(
    basis: Tensor, values: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Add columns to a sketch U diag(s) U^T of a sum of outer products, at unchanged rank.

    The eigenvalues of U diag(s) U^T + X X^T beyond the k-th are dropped and the largest of them,
    which bounds what is lost, is taken off the others (deflation) and returned:
    0 <= exact - sketch <= cutoff I. No d x d matrix is formed unless X has as many entries.

    Args:
        basis: U, orthonormal columns, shape (..., d, k).
        values: s, not negative, shape (..., k).
        columns: X, shape (..., d, c).

    Returns:
        The new U, the new s in descending order, and the cutoff (...).

    Reference:
        "Frequent Directions", Ghashami et al., 2016; "Sketchy", Feinberg et al., 2023. The
        deflation is the authors' code's (the (k+1)-th eigenvalue); the paper's text takes off the
        k-th, which wastes a direction.
    """
    d, k = basis.shape[-2:]
    if d <= k + columns.shape[-1]:
        joint = (basis * values[..., None, :]) @ basis.mT + columns @ columns.mT
        found, vectors = eigh(joint)
    else:
        stacked = torch.cat([basis * values.sqrt()[..., None, :], columns], dim=-1)
        outer, triangle = torch.linalg.qr(stacked)
        found, inner = eigh(triangle @ triangle.mT)
        vectors = outer @ inner[..., -k:]
    found = torch.where(found > relative_floor(found), found, 0.0)
    cutoff = found[..., -k - 1] if found.shape[-1] > k else torch.zeros_like(found[..., 0])
    kept = found[..., -k:] - cutoff[..., None]
    return vectors[..., -k:].flip(-1), kept.flip(-1), cutoff


def randomized_svd(
    matrix: Tensor, draws: Tensor, rank: int, iterations: int
) -> tuple[Tensor, Tensor]:
    """Return the rank-k fit Q U^T of a matrix by randomized subspace iteration.

    Y = A Omega; then ``iterations`` times Q = orth(A orth(A^T Q)); the small matrix Q^T A is cut to
    its leading k singular triplets.

    Args:
        matrix: A, shape (..., m, n).
        draws: Omega, independent normal numbers, shape (..., n, k + oversampling), at most
            min(m, n) columns.
        rank: k.
        iterations: Rounds of subspace iteration.

    Returns:
        Q with orthonormal columns, (..., m, k), and U, (..., n, k).

    Reference:
        "Finding structure with randomness", Halko et al., 2011, Algorithms 4.4 and 5.1.
    """
    basis = torch.linalg.qr(matrix @ draws).Q
    for _ in range(iterations):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ basis).Q).Q
    inner, sigma, right = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
    return basis @ inner[..., :rank], right.mT[..., :rank] * sigma[..., None, :rank]
