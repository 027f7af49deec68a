"""Sums of squares of scaled matrices: how long an update is, before it is made."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from neurms.compiled._tiles import accumulator, along_features, along_units
from neurms.compiled.lists import list_kernel
from neurms.compiled.native import addresses, library, numbers, threads
from neurms.compiled.update import as_rows, have_rows

__all__ = ["move_square_sums"]


@list_kernel
def move_square_sums(
    matrices: Sequence[Tensor], lefts: Sequence[Tensor | None], rights: Sequence[Tensor | None]
) -> Tensor:
    """Return ``sum_ij (left_i X_ij right_j)^2`` of several tensors, in one read of each.

    Args:
        matrices: X, shapes (m,), (m, n) or (groups, units, features, taps); only read.
        lefts: Unit scales, shape (m,), or None for 1.
        rights: Feature scales, shape (n,), or None for 1; None for (m,) tensors.

    Returns:
        Shape (count,), float64, on the device of the first.

    Raises:
        ValueError: If shapes do not fit.

    Reference:
        What ``apply_updates_(..., measure=True)`` returns, without moving anything.

    Example:
        >>> import torch
        >>> sums = move_square_sums([torch.ones(2, 2)], [torch.tensor([1.0, 2.0])], [None])
        >>> [round(total, 4) for total in sums.tolist()]
        [10.0]
    """
    items = zip(matrices, lefts, rights, strict=True)
    sums = [_square_sum(x, left, right) for x, left, right in items]
    if not sums:
        return torch.zeros(0, dtype=torch.float64)
    return torch.stack([total.to(sums[0].device) for total in sums])


def _square_sum(x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    wide = accumulator(x.dtype)
    scaled = x.to(wide)
    # As the move has it: the feature scale first.
    if right is not None:
        scaled = scaled * along_features(right, x).to(wide)
    if left is not None:
        scaled = scaled * along_units(left, x).to(wide)
    norm: Tensor = torch.linalg.vector_norm(scaled, dtype=torch.float64)
    return norm.square()


def _have_rows(*columns: Sequence[Tensor | None]) -> list[bool]:
    matrices, lefts, rights = columns
    return have_rows(matrices, matrices, [None] * len(matrices), lefts, rights)


@move_square_sums.native(_have_rows)
def _move_square_sums(
    matrices: Sequence[Tensor], lefts: Sequence[Tensor | None], rights: Sequence[Tensor | None]
) -> Tensor:
    kernels = library()
    assert kernels is not None
    x, left, right = [], [], []
    for item in zip(matrices, matrices, [None] * len(matrices), lefts, rights, strict=True):
        rows = as_rows(item)
        assert rows is not None
        own = rows[0]
        x.append(own)
        # A vector is one row, whose elements have factors of their own.
        left.append(rows[3] if own.ndim == 2 else None)
        right.append(rows[4] if own.ndim == 2 else rows[3])
    sums = torch.empty(len(x), dtype=torch.float64)
    kernels.neurms_move_square_sums(
        len(x),
        addresses(x),
        numbers("q", [own.shape[0] if own.ndim == 2 else 1 for own in x]),
        numbers("q", [own.shape[-1] for own in x]),
        addresses(left),
        addresses(right),
        sums.data_ptr(),
        threads(),
    )
    return sums
