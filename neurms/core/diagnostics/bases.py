"""How far a basis turns when it is renewed: what Alice's tracking and switching are about."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["basis_cosines", "subspace_cosines"]


@torch.no_grad()
def basis_cosines(old: Tensor, new: Tensor) -> Tensor:
    """Return |cos| of the angle between each direction before and after a renewal.

    An eigenvector's sign means nothing, hence the absolute value. Directions that changed places
    have small cosines here, and large ones in :func:`subspace_cosines`.

    Args:
        old: U before, columns of any length, shape (..., m, r).
        new: U' after, the same shape.

    Returns:
        Shape (..., r), in [0, 1]; zero for a column of zeros, as before a first step.

    Raises:
        ValueError: The shapes differ.

    Reference:
        Structured-Fisher paper, the ablation of the switch: "cosine similarity of the basis before
        and after".

    Example:
        >>> import torch
        >>> basis_cosines(torch.eye(2), torch.tensor([[-1.0, 0.6], [0.0, 0.8]]))
        tensor([1.0000, 0.8000])
    """
    _check_alike(old, new)
    lengths = torch.linalg.vector_norm(old, dim=-2) * torch.linalg.vector_norm(new, dim=-2)
    products = (old * new).sum(-2).abs()
    cosines: Tensor = torch.where(lengths > 0, products / lengths, 0.0).clamp(max=1.0)
    return cosines


@torch.no_grad()
def subspace_cosines(old: Tensor, new: Tensor) -> Tensor:
    """Return the cosines of the principal angles between two subspaces, greatest first.

    Args:
        old: Orthonormal columns, shape (..., m, r).
        new: Orthonormal columns, the same shape.

    Returns:
        Shape (..., r), in [0, 1]: all 1 where both span the same space.

    Raises:
        ValueError: The shapes differ.

    Example:
        >>> import torch
        >>> swapped = torch.eye(2).flip(1)
        >>> basis_cosines(torch.eye(2), swapped), subspace_cosines(torch.eye(2), swapped)
        (tensor([0., 0.]), tensor([1., 1.]))
    """
    _check_alike(old, new)
    cosines: Tensor = torch.linalg.svdvals(old.mT @ new).clamp(max=1.0)
    return cosines


def _check_alike(old: Tensor, new: Tensor) -> None:
    if old.shape != new.shape:
        raise ValueError(
            f"new has shape {tuple(new.shape)} and old {tuple(old.shape)}; pass the same layer's "
            "basis before and after a renewal"
        )
