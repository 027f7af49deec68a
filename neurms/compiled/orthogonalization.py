"""Matrices made (nearly) orthogonal, by products alone."""

from __future__ import annotations

import torch
from torch import Tensor

from neurms.compiled.backends import kernel
from neurms.compiled.products import product
from neurms.compiled.symmetric import half_product_, panel_count

__all__ = ["newton_schulz", "whiten"]


@kernel
def newton_schulz(
    matrix: Tensor, steps: int, a: float, b: float, c: float, bfloat16: int = 0
) -> Tensor:
    """Orthogonalise by an odd polynomial in the matrix, applied again and again.

    From ``X = G / ||G||``, ``steps`` times: ``X <- a X + (b A + c A^2) X`` with ``A = X X^T``. With
    G = U S V^T this drives the singular values to about 1 and leaves U and V as they are. Worked on
    the side with the smaller Gram matrix.

    Every X is a polynomial in the first A times the first X. So a large matrix that is longer than
    wide has its rounds on m x m matrices alone: ``B = a I + b A + c A^2``, ``P <- P B``,
    ``A <- B A B``, and ``P X`` at the end.

    Args:
        matrix: G, shape (..., m, n), float32 or float64.
        steps: Number of rounds.
        a: Coefficient of X.
        b: Coefficient of X X^T X.
        c: Coefficient of (X X^T)^2 X.
        bfloat16: 0 multiplies in the matrix's own precision; 1 in bfloat16; 2 in bfloat16 where the
            processor has no such products: the same numbers up to the order of sums, from
            products of float32.

    Returns:
        Shape (..., m, n). Zero for a zero matrix. A long matrix's differs from that of rounds on X
        by less than 1e-5 in float32, and by less than 1e-3 where its singular values lie nine
        powers of ten apart; one in bfloat16 by 1 to 4 %, there by up to 22 %.

    Reference:
        Jordan et al., "Muon", 2024: (3.4445, -4.7750, 2.0315), 5 steps, whose singular values end
        in about [0.7, 1.2] instead of at 1. Departures: the norm is exact at every scale, where the
        reference has max(||G||, 1e-7) and shrinks smaller matrices; the reference's bfloat16 only
        on request.

    Example:
        >>> import torch
        >>> x = newton_schulz(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), 20, 1.5, -0.5, 0.0)
        >>> torch.allclose(x, torch.eye(2))
        True
    """
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = _unit_norm(matrix.mT if tall else matrix)
    if bfloat16 > 0:
        x = _low_rounds(x.to(torch.bfloat16), steps, a, b, c, bfloat16 == 1).to(matrix.dtype)
    elif x.shape[-2] >= 128 and 2 * x.shape[-1] >= 3 * x.shape[-2]:
        x = _gram_rounds(x, steps, a, b, c)
    else:
        # No call for a product that is not cut, nor for a size: small matrices wait for calls.
        cut = x.dim() == 2 and panel_count(x.shape[-2]) > 1
        for _ in range(steps):
            gram = _symmetric(x, x.mT) if cut else x @ x.mT
            if cut:
                x = product(_polynomial(gram, 0.0, b, c), x).add_(x, alpha=a)
            else:
                x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


def _gram_rounds(x: Tensor, steps: int, a: float, b: float, c: float) -> Tensor:
    gram = _symmetric(x, x.mT)
    polynomial = gram
    for step in range(steps):
        factor = _polynomial(gram, a, b, c)
        # All of them commute, so that their products are symmetric.
        polynomial = factor if step == 0 else _symmetric(polynomial, factor)
        if step + 1 < steps:
            gram = _symmetric(factor, _symmetric(gram, factor))
    return product(polynomial, x)


def _polynomial(gram: Tensor, a: float, b: float, c: float) -> Tensor:
    """Return a I + b A + c A^2 for symmetric A (..., m, m)."""
    if gram.dim() > 2 or panel_count(gram.size(-1)) == 1:
        result = b * gram + c * (gram @ gram)
    else:
        result = half_product_(gram.clone(), gram, gram, b, c)
    if a != 0.0:
        result.diagonal(0, -2, -1).add_(a)
    return result


def _symmetric(x: Tensor, y: Tensor) -> Tensor:
    """Return ``x @ y``, known to be symmetric: of a large one half is computed, and mirrored."""
    if x.dim() > 2 or panel_count(x.size(-2)) == 1:
        return x @ y
    empty = torch.empty([x.size(-2), x.size(-2)], dtype=x.dtype, device=x.device)
    return half_product_(empty, x, y, 0.0, 1.0)


def _low_rounds(x: Tensor, steps: int, a: float, b: float, c: float, native: bool) -> Tensor:
    # Panels of shorter rows cost two threads as much as halves save.
    halved = native and x.shape[-1] >= 2 * x.shape[-2]
    for _ in range(steps):
        if native:
            gram = _symmetric(x, x.mT) if halved else x @ x.mT
        else:
            gram = (x.float() @ x.mT.float()).to(torch.bfloat16)
        x = _low_sum(x, a, _low_sum(gram, b, gram, gram, c, native), x, 1.0, native)
    return x


def _low_sum(
    total: Tensor, keep: float, x: Tensor, y: Tensor, share: float, native: bool
) -> Tensor:
    """Return ``keep total + share x @ y``, rounded once."""
    if not native:
        return (keep * total.float() + share * (x.float() @ y.float())).to(torch.bfloat16)
    if total.dim() == 2:
        return torch.addmm(total, x, y, beta=keep, alpha=share)
    many = [part.flatten(0, -3) for part in (total, x, y)]
    return torch.baddbmm(many[0], many[1], many[2], beta=keep, alpha=share).view_as(total)


def _unit_norm(matrix: Tensor) -> Tensor:
    # Through the largest entry first, because squares of the entries over- and underflow.
    peak = matrix.abs().amax([-2, -1], True)
    scaled = matrix / torch.where(peak > 0, peak, torch.ones_like(peak))
    norm: Tensor = torch.linalg.vector_norm(scaled, 2.0, [-2, -1], True)
    return scaled / norm.clamp(min=1.0)


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
    y = product(x, x.mT)
    z = eye.expand_as(y)
    for _ in range(steps):
        t = beta * (3.0 * eye - product(z, y))
        y = product(y, t)
        z = product(t, z)
    x = product(z, x)
    return x.mT if tall else x
