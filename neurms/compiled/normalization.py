"""Rows made unit vectors, and matrices made (nearly) orthogonal."""

from __future__ import annotations

import torch
from torch import Tensor

from neurms.compiled._tiles import is_fused
from neurms.compiled.backends import kernel


def row_norms(matrix: Tensor) -> Tensor:
    """Return the Euclidean norms of the rows, shape (..., m, 1), at any magnitude.

    Squares of float32 are summed in float64 where that is cheap, or where they may under- or
    overflow: it makes the pass over a large matrix four times as long.
    """
    if not (is_fused() or matrix.numel() <= 32768 or matrix.device.type != "cpu"):
        norms: Tensor = torch.linalg.vector_norm(matrix, 2.0, [-1], True)
        if bool(((norms > 1e-15) & (norms < 1e18)).all()):
            return norms
    wide: Tensor = torch.linalg.vector_norm(matrix, 2.0, [-1], True, dtype=torch.float64)
    return wide.to(matrix.dtype)


@kernel
def row_normalize(matrix: Tensor, floor: float) -> Tensor:
    """Divide every row by its Euclidean norm.

    ``out_i = x_i / max(||x_i||, floor)``.

    Args:
        matrix: Shape (..., m, n), float32 or float64.
        floor: Least norm; rows of zeros stay zero.

    Returns:
        The same shape.

    Reference:
        RMNP, arXiv 2603.20527, with floor 1e-12. ``vector_norm`` over the last axis is one fused
        pass: 0.5 ms at 4096 x 1024 where a sum of squares with its temporary takes 0.9.
        Settled: exact at every magnitude.

    Example:
        >>> import torch
        >>> row_normalize(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), 1e-12)
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    return matrix / row_norms(matrix).clamp(min=floor)


def _unit_norm(matrix: Tensor) -> Tensor:
    # Through the largest entry first, because squares of the entries over- and underflow.
    peak = matrix.abs().amax([-2, -1], True)
    scaled = matrix / torch.where(peak > 0, peak, torch.ones_like(peak))
    norm: Tensor = torch.linalg.vector_norm(scaled, 2.0, [-2, -1], True)
    return scaled / norm.clamp(min=1.0)


@kernel
def newton_schulz(matrix: Tensor, steps: int, a: float, b: float, c: float) -> Tensor:
    """Orthogonalise by an odd polynomial in the matrix, applied again and again.

    From ``X = G / ||G||``, ``steps`` times: ``X <- a X + (b A + c A^2) X`` with ``A = X X^T``. With
    G = U S V^T this drives the singular values to about 1 and leaves U and V as they are. Worked on
    the side with the smaller Gram matrix.

    Args:
        matrix: G, shape (..., m, n), float32 or float64.
        steps: Number of rounds.
        a: Coefficient of X.
        b: Coefficient of X X^T X.
        c: Coefficient of (X X^T)^2 X.

    Returns:
        Shape (..., m, n). Zero for a zero matrix.

    Reference:
        Jordan et al., "Muon", 2024: (3.4445, -4.7750, 2.0315), 5 steps, whose singular values end
        in about [0.7, 1.2] instead of at 1. Departures: float32 instead of bfloat16; the norm is
        exact at every scale, where the reference has max(||G||, 1e-7) and shrinks smaller matrices.

    Example:
        >>> import torch
        >>> x = newton_schulz(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), 20, 1.5, -0.5, 0.0)
        >>> torch.allclose(x, torch.eye(2))
        True
    """
    tall = matrix.size(-2) > matrix.size(-1)
    x = _unit_norm(matrix.mT if tall else matrix)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


@kernel
def whiten(matrix: Tensor, steps: int, beta: float) -> Tensor:
    """Whiten by the coupled Newton-Schulz iteration for an inverse square root.

    With ``X = G / ||G||``, ``Y = X X^T``, ``Z = I``, ``steps`` times: ``T = beta (3 I - Z Y)``,
    ``Y <- Y T``, ``Z <- T Z``. Then ``Z X`` tends to ``(G G^T)^(-1/2) G`` for ``beta = 1/2``.
    Worked on the side with the smaller Gram matrix, which gives the same.

    Args:
        matrix: G, shape (..., m, n), float32 or float64.
        steps: Number of rounds.
        beta: 1/2 converges. Above, small singular values grow faster and all end in an interval
            around 1: [0.56, 1.6] for 0.8.

    Returns:
        Shape (..., m, n). Zero for a zero matrix.

    Reference:
        Ma et al., "SWAN", arXiv 2412.13148, Algorithm 2.

    Example:
        >>> import torch
        >>> torch.allclose(whiten(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), 20, 0.5), torch.eye(2))
        True
    """
    tall = matrix.size(-2) > matrix.size(-1)
    x = _unit_norm(matrix.mT if tall else matrix)
    eye = torch.eye(x.size(-2), dtype=x.dtype, device=x.device)
    y = x @ x.mT
    z = eye.expand_as(y)
    for _ in range(steps):
        t = beta * (3.0 * eye - z @ y)
        y = y @ t
        z = t @ z
    x = z @ x
    return x.mT if tall else x
