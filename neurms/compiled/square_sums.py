"""Row and column sums of a gradient's squares in one read of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neurms.compiled._tiles import is_tiled, tile_length
from neurms.compiled.backends import Kernel, kernel
from neurms.compiled.lists import list_kernel
from neurms.compiled.native import (
    addresses,
    are_plain,
    is_plain,
    library,
    numbers,
    threads,
)

__all__ = [
    "are_stored",
    "averages_and_scales",
    "joint_square_sums",
    "square_sums",
    "vectors",
    "with_bias",
]


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
    if are_plain(gradients):
        return [g.ndim == 2 for g in gradients]
    return [g.dim() == 2 and (is_plain(g) or is_plain(g.mT)) for g in gradients]


@square_sums.native(are_stored)
def _square_sums(gradients: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    return _read(gradients, [g.shape[1] for g in gradients])


def _read(gradients: Sequence[Tensor], widths: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Return row sums, and column sums at the beginning of vectors of ``widths``."""
    kernels = library()
    assert kernels is not None
    rows = vectors(gradients[0], [g.shape[0] for g in gradients], torch.float64)
    columns = vectors(gradients[0], widths, torch.float64)
    # One that is stored by columns is read as its transpose: its rows are the columns.
    stored = list(map(Tensor.is_contiguous, gradients))
    sizes = [g.shape if own else g.shape[::-1] for g, own in zip(gradients, stored, strict=True)]
    pairs = [(r, c) if own else (c, r) for r, c, own in zip(rows, columns, stored, strict=True)]
    kernels.neurms_square_sums(
        len(gradients),
        addresses(gradients),
        numbers("q", [m for m, _ in sizes]),
        numbers("q", [n for _, n in sizes]),
        addresses([first for first, _ in pairs]),
        addresses([second for _, second in pairs]),
        threads(),
    )
    return rows, columns


def with_bias(rows: Tensor, columns: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of [G | g], a matrix with a bias's gradient as one more column.

    Args:
        rows: G's row sums of squares, shape (..., m).
        columns: G's column sums of squares, shape (..., n).
        bias: g, shape (..., m).

    Returns:
        Row sums (..., m) and column sums (..., n + 1).

    Example:
        >>> import torch
        >>> with_bias(torch.tensor([1.0, 4.0]), torch.tensor([5.0]), torch.tensor([1.0, 2.0]))
        (tensor([2., 8.], dtype=torch.float64), tensor([5., 5.], dtype=torch.float64))
    """
    squares = bias.to(torch.float64).square()
    last = squares.sum(-1, keepdim=True)
    return rows.to(torch.float64) + squares, torch.cat([columns.to(torch.float64), last], -1)


@list_kernel
def joint_square_sums(
    gradients: Sequence[Tensor], biases: Sequence[Tensor | None], widths: Sequence[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """Row sums and column sums of the squares of [G | g], biases being one more column.

    Args:
        gradients: Matrices G, each of shape (m, n), float32 or float64, any strides.
        biases: g of every matrix, shape (m,), or None for none.
        widths: Column sums of every matrix that are asked for: n, or n + 1 with a bias; without
            one the last is zero.

    Returns:
        Row sums of every matrix, shape (m,), and column sums, shape (width,), float64.

    Reference:
        The statistic of NeuRMS's variant P, whose biases are weights of an input of 1.

    Example:
        >>> import torch
        >>> g, b = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1.0, 2.0])
        >>> joint_square_sums([g, g], [b, None], [3, 3])[1]
        [tensor([10., 20.,  5.], dtype=torch.float64), tensor([10., 20.,  0.], dtype=torch.float64)]
    """
    each = zip(gradients, biases, widths, strict=True)
    made = [_joint(_sums(gradient), bias, width) for gradient, bias, width in each]
    return [rows for rows, _ in made], [columns for _, columns in made]


def _joint(sums: tuple[Tensor, Tensor], bias: Tensor | None, width: int) -> tuple[Tensor, Tensor]:
    rows, columns = sums
    if bias is not None:
        return with_bias(rows, columns, bias)
    missing = width - columns.numel()
    return rows, torch.cat([columns, columns.new_zeros(missing)]) if missing else columns


def _are_joint(
    gradients: Sequence[Tensor], biases: Sequence[Tensor | None], widths: Sequence[int]
) -> list[bool]:
    plain = are_plain([bias for bias in biases if bias is not None])
    return [
        good
        and g.shape[1] <= width <= g.shape[1] + 1
        and (
            bias is None
            or ((plain or is_plain(bias)) and bias.shape == g.shape[:1] and width > g.shape[1])
        )
        for good, g, bias, width in zip(
            are_stored(gradients), gradients, biases, widths, strict=True
        )
    ]


@joint_square_sums.native(_are_joint)
def _joint_square_sums(
    gradients: Sequence[Tensor], biases: Sequence[Tensor | None], widths: Sequence[int]
) -> tuple[list[Tensor], list[Tensor]]:
    kernels = library()
    assert kernels is not None
    rows, columns = _read(gradients, widths)
    units, features = [g.shape[0] for g in gradients], [g.shape[1] for g in gradients]
    starts = list(map(Tensor.data_ptr, columns))
    last = [
        start + 8 * n if width > n else 0
        for start, n, width in zip(starts, features, widths, strict=True)
    ]
    kernels.neurms_column_squares(
        len(units), addresses(biases), numbers("q", units), addresses(rows), numbers("Q", last)
    )
    return rows, columns


def vectors(like: Tensor, sizes: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    """Return vectors of the given sizes, parts of one new tensor."""
    return list(like.new_empty(sum(sizes), dtype=dtype).split(list(sizes)))


def averages_and_scales(q: Sequence[Tensor], s: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return four lists of new float32 vectors, sized as q, s, q and s: averages and scales."""
    units, features = [x.numel() for x in q], [x.numel() for x in s]
    made, count = vectors(q[0], 2 * (units + features), torch.float32), len(q)
    return [made[k * count : (k + 1) * count] for k in range(4)]
