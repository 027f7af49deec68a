"""A k x k block for each unit: turned into a new basis, and rooted, all units at once.

Not kernels: what cannot be scripted, LAPACK's retries, is the larger part of the definition, so it
runs as it is written on every backend but ``auto``, which has a native form for large layers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from neurms.compiled.backends import current_backend
from neurms.compiled.native import is_plain, library, suits, threads
from neurms.compiled.roots import eigenvalues, eigh, relative_floor

__all__ = ["Mover", "move_unit_blocks_", "mover", "rooted"]

LARGEST = 64
"""k up to which there is a native form."""

Mover = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, float, int],
    tuple[Tensor, Tensor],
]


def mover(blocks: Tensor) -> Mover:
    """Return the form of :func:`move_unit_blocks_` that runs here and now for these blocks.

    Args:
        blocks: All of a layer's, (..., m, k, k): parts of them are to be moved in the same form.
    """
    if current_backend() != "auto" or torch.compiler.is_compiling():
        return move_unit_blocks_
    return _native if blocks.shape[-1] <= LARGEST and suits(blocks) else move_unit_blocks_


def move_unit_blocks_(
    blocks: Tensor,
    rho: Tensor,
    to_old: Tensor,
    coordinates: Tensor,
    further: Tensor | None,
    beyond: Tensor | None,
    eps: float,
    iterations: int,
) -> tuple[Tensor, Tensor]:
    """Take each unit's gradient g_i into B R_i B^T + rho_i I in a new basis B', and root it.

    In a frame whose first vectors are B', with M_i = B R_i B^T + g_i g_i^T and P_i = B'^T M_i B':
    ``R_i <- P_i - sigma_min(P_i) I``, ``rho_i <- rho_i + ||M_i - B' R_i B'^T||_2``, and then
    ``(R_i + (rho_i + eps) I)^(-1/2) c_i`` and ``(rho_i + eps)^(-1/2)``. Eigenvalues below rounding
    (k ulp of a unit's largest) count as that much. Without a frame B' spans everything, and the
    norm is sigma_min(P_i) itself.

    Args:
        blocks: R_i, shape (..., m, k, k), symmetric; overwritten.
        rho: Shape (..., m); overwritten.
        to_old: B in the frame, shape (..., d, k), its first k rows B'^T B; (..., k, k) without one.
        coordinates: c_i = B'^T g_i, shape (..., m, k).
        further: g_i along the frame's other vectors, shape (..., m, d - k), or None.
        beyond: Length of what is left of g_i outside the frame, shape (..., m, 1), or None.
        eps: Added to every eigenvalue, positive.
        iterations: Lanczos steps for the spectral norm, from below.

    Returns:
        The rooted coordinates (..., m, k), and the root's value outside of B' (..., m, 1).

    Raises:
        torch.linalg.LinAlgError: An operand is NaN or infinite; blocks and rho are partly moved.

    Reference:
        "Block Low-Rank Preconditioner with Shared Basis for Stochastic Optimization", Yen et al.,
        NeurIPS 2023, Algorithm 1.

    Example:
        >>> import torch
        >>> blocks, rho = torch.zeros(1, 2, 2), torch.zeros(1)
        >>> c = torch.tensor([[3.0, 4.0]])
        >>> inside, _ = move_unit_blocks_(blocks, rho, torch.eye(2), c, None, None, 1e-6, 8)
        >>> inside, blocks
        (tensor([[0.6000, 0.8000]]), tensor([[[ 9., 12.],
                 [12., 16.]]]))
    """
    k = blocks.shape[-1]
    turn = to_old[..., None, :k, :]
    turned = turn @ blocks @ turn.mT
    projected = (turned + turned.mT).mul_(0.5)
    projected.addcmul_(coordinates[..., :, None], coordinates[..., None, :])
    peak = projected.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True)
    values, vectors = eigh(projected)
    shift = values[..., :1].clamp(min=0.0)
    values = values - shift
    projected.diagonal(dim1=-2, dim2=-1).sub_(shift)
    if further is not None and beyond is not None:
        outer = torch.cat([coordinates, further, beyond], dim=-1)
        rho.add_(_residual_norm(blocks, to_old, projected, outer, peak, iterations))
    else:
        rho.add_(shift[..., 0])
    blocks.copy_(projected)
    return rooted(values, vectors, coordinates, rho[..., None] + eps)


def rooted(
    values: Tensor, vectors: Tensor, coordinates: Tensor, ridge: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (R_i + ridge_i I)^(-1/2) c_i (..., m, k) from R_i's eigenpairs, and ridge_i^(-1/2).

    Both with eigenvalues of rounding error replaced by :func:`~.roots.relative_floor`.
    """
    floor = relative_floor(values)
    turned = (coordinates[..., None, :] @ vectors)[..., 0, :]
    turned = turned * torch.maximum(values.clamp(min=0.0) + ridge, floor).rsqrt()
    return (turned[..., None, :] @ vectors.mT)[..., 0, :], torch.maximum(ridge, floor).rsqrt()


def _residual_norm(
    blocks: Tensor,
    to_old: Tensor,
    projected: Tensor,
    outer: Tensor,
    peak: Tensor,
    iterations: int,
) -> Tensor:
    """Return ||B R_i B^T + g_i g_i^T - B' R_i' B'^T||_2 (..., m), ``outer`` g_i in the frame."""
    k = blocks.shape[-1]
    # A unit's matrices enter in units of |g_i|^2 or ``peak``, or the iteration would leave float32.
    # The vectors that they meet are scaled, of length 1, instead of k^2 numbers of each unit.
    scale = torch.maximum(peak, outer.square().sum(-1, keepdim=True))
    scale = torch.where(scale > 0, scale, 1.0).clamp(min=torch.finfo(scale.dtype).tiny)
    outer = outer / scale.sqrt()

    def product(x: Tensor) -> Tensor:
        head = x[..., :-1] / scale
        image = outer * (outer * x).sum(-1, keepdim=True)
        image[..., :-1] += _batched(blocks, head @ to_old) @ to_old.mT
        image[..., :k] -= _batched(projected, head[..., :k])
        return image

    norm = _largest_eigenvalue(product, outer + torch.ones_like(outer), iterations)
    return norm * scale[..., 0]


def _largest_eigenvalue(
    product: Callable[[Tensor], Tensor], start: Tensor, iterations: int
) -> Tensor:
    """Return max |lambda| (...) of symmetric operators on vectors (..., d), from below.

    Lanczos: the largest eigenvalue of the tridiagonal matrix of its recurrence. Lost orthogonality
    only repeats eigenvalues that have converged, so nothing is made orthogonal again.
    """
    ulp = torch.finfo(start.dtype).eps
    count = min(iterations, start.shape[-1])
    tridiagonal = start.new_zeros((*start.shape[:-1], count, count))
    last, beta = torch.zeros_like(start), start.new_zeros((*start.shape[:-1], 1))
    x = product(start)
    x = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    for i in range(count):
        image = product(x)
        alpha = (x * image).sum(-1, keepdim=True)
        tridiagonal[..., i, i] = alpha[..., 0]
        if i + 1 == count:
            break
        rest = image - alpha * x - beta * last
        beta = torch.linalg.vector_norm(rest, dim=-1, keepdim=True)
        # What rounding left of an invariant subspace is no new direction.
        fresh = beta > 64 * ulp * torch.linalg.vector_norm(image, dim=-1, keepdim=True)
        last, x = x, torch.where(fresh, rest / torch.where(fresh, beta, 1.0), 0.0)
        beta = torch.where(fresh, beta, 0.0)
        tridiagonal[..., i + 1, i] = tridiagonal[..., i, i + 1] = beta[..., 0]
    return eigenvalues(tridiagonal).abs().amax(-1)


def _batched(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Return A_i x_i, shape (..., k), for symmetric A_i (..., k, k) and x_i (..., k)."""
    # A row times a matrix: a sixth of the time of a matrix times a column in batched products.
    return (vectors[..., None, :] @ matrices)[..., 0, :]


def _native(
    blocks: Tensor,
    rho: Tensor,
    to_old: Tensor,
    coordinates: Tensor,
    further: Tensor | None,
    beyond: Tensor | None,
    eps: float,
    iterations: int,
) -> tuple[Tensor, Tensor]:
    """Do what :func:`move_unit_blocks_` does, in native code, one matrix after the other."""
    kernels = library()
    assert kernels is not None
    coordinates = coordinates.contiguous()
    inside, factors = torch.empty_like(coordinates), torch.empty_like(rho)
    if blocks.ndim > 3:
        for at in range(blocks.shape[0]):
            inside[at], factors[at, :, None] = _native(
                blocks[at],
                rho[at],
                to_old[at],
                coordinates[at],
                None if further is None else further[at],
                None if beyond is None else beyond[at],
                eps,
                iterations,
            )
        return inside, factors[..., None]
    own, damping, to_old = blocks.contiguous(), rho.contiguous(), to_old.contiguous()
    others = [None if x is None else x.contiguous() for x in (further, beyond)]
    assert all(is_plain(x) for x in (own, damping, to_old, coordinates))
    unsolved = kernels.neurms_move_unit_blocks(
        *(x.data_ptr() for x in (own, damping, to_old, coordinates)),
        *(None if x is None else x.data_ptr() for x in others),
        blocks.shape[0],
        blocks.shape[-1],
        to_old.shape[0],
        iterations,
        eps,
        inside.data_ptr(),
        factors.data_ptr(),
        threads(),
    )
    if unsolved:
        raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
            "a unit's block holds NaN or infinity, and its eigenvalues cannot be found; lower lr "
            "or clip gradients"
        )
    for stored, moved in ((blocks, own), (rho, damping)):
        if stored is not moved and stored.data_ptr() != moved.data_ptr():
            stored.copy_(moved)
    increment_version((blocks, rho))
    return inside, factors[..., None]
