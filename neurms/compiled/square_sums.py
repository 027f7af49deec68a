"""Row and column sums of a gradient's squares in one read of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neurms.compiled._tiles import is_tiled, tile_length
from neurms.compiled.backends import Kernel, kernel
from neurms.compiled.lists import list_kernel
from neurms.compiled.native import addresses, is_plain, library, numbers, threads

__all__ = ["are_stored", "averages_and_scales", "square_sums", "vectors"]


def _sums_of(gradient: Tensor) -> tuple[Tensor, Tensor]:
    if gradient.device.type != "cpu":
        # An accelerator widens the numbers while it reduces them; nothing of G's size is made.
        rows = torch.linalg.vector_norm(gradient, 2.0, [-1], dtype=torch.float64)
        columns = torch.linalg.vector_norm(gradient, 2.0, [-2], dtype=torch.float64)
        return rows.square(), columns.square()
    if gradient.dim() != 2 or not is_tiled(gradient):
        squares = gradient.to(torch.float64).square()
        return squares.sum(-1), squares.sum(-2)
    total = torch.zeros(gradient.size(1), dtype=torch.float64)
    by_rows: list[Tensor] = []
    for tile in gradient.split(tile_length(gradient, 0)):
        squares = tile.to(torch.float64).square()
        by_rows.append(squares.sum(-1))
        total += squares.sum(-2)
    return torch.cat(by_rows), total


_sums: Kernel[..., Any] = kernel(_sums_of)


@list_kernel
def square_sums(gradients: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Row sums and column sums of the squares of several gradients.

    ``R_i = sum_j G_ij^2`` and ``C_j = sum_i G_ij^2``, squared and added up in float64: squares of
    float32 numbers neither underflow nor overflow there, so that no gradient is too small or large.

    Args:
        gradients: Matrices G, each of shape (..., m, n), float32 or float64, any strides.

    Returns:
        R of every matrix, shape (..., m), and C of every matrix, shape (..., n), float64.

    Reference:
        The statistic of Adafactor, and of NeuRMS's variant P.

    Example:
        >>> import torch
        >>> square_sums([torch.tensor([[1.0, 2.0], [3.0, 4.0]])])
        ([tensor([ 5., 25.], dtype=torch.float64)], [tensor([10., 20.], dtype=torch.float64)])
    """
    made = [_sums(gradient) for gradient in gradients]
    return [rows for rows, _ in made], [columns for _, columns in made]


def are_stored(gradients: Sequence[Tensor]) -> list[bool]:
    """Return which matrices native kernels read: plain float32, by rows or by columns."""
    return [g.dim() == 2 and (is_plain(g) or is_plain(g.mT)) for g in gradients]


@square_sums.native(are_stored)
def _square_sums(gradients: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    kernels = library()
    assert kernels is not None
    # One that is stored by columns is read as its transpose: its rows are the columns.
    turned = [not gradient.is_contiguous() for gradient in gradients]
    sizes = [g.shape[::-1] if turn else g.shape for g, turn in zip(gradients, turned, strict=True)]
    units, features = [m for m, _ in sizes], [n for _, n in sizes]
    rows = vectors(gradients[0], units, torch.float64)
    columns = vectors(gradients[0], features, torch.float64)
    kernels.neurms_square_sums(
        len(gradients),
        addresses(gradients),
        numbers("q", units),
        numbers("q", features),
        addresses(rows),
        addresses(columns),
        threads(),
    )
    for i, turn in enumerate(turned):
        if turn:
            rows[i], columns[i] = columns[i], rows[i]
    return rows, columns


def vectors(like: Tensor, sizes: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    """Return vectors of the given sizes, parts of one new tensor."""
    return list(like.new_empty(sum(sizes), dtype=dtype).split(list(sizes)))


def averages_and_scales(q: Sequence[Tensor], s: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return four lists of new float32 vectors, sized as q, s, q and s: averages and scales."""
    units, features = [x.numel() for x in q], [x.numel() for x in s]
    made, count = vectors(q[0], 2 * (units + features), torch.float32), len(q)
    return [made[k * count : (k + 1) * count] for k in range(4)]
