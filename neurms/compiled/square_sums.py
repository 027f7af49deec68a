"""Row and column sums of squares in one read: of a gradient, or of what it makes of an average."""

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
    "average_square_sums",
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


def _read(
    gradients: Sequence[Tensor],
    widths: Sequence[int],
    averages: Sequence[Tensor] | None = None,
    fresh: float = 1.0,
    kept: float = 0.0,
) -> tuple[list[Tensor], list[Tensor]]:
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
        None if averages is None else addresses(averages),
        fresh,
        kept,
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
    rows, columns = _read(gradients, widths)
    _add_biases_(gradients, biases, None, 1.0, 0.0, rows, columns)
    return rows, columns


def _add_biases_(
    gradients: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    averages: Sequence[Tensor | None] | None,
    fresh: float,
    kept: float,
    rows: Sequence[Tensor],
    columns: Sequence[Tensor],
) -> None:
    """Add the squares of biases to sums by row, and write their own sums behind those by column."""
    kernels = library()
    assert kernels is not None
    starts = list(map(Tensor.data_ptr, columns))
    features = [g.shape[1] for g in gradients]
    last = [
        start + 8 * n if sums.shape[0] > n else 0
        for start, n, sums in zip(starts, features, columns, strict=True)
    ]
    kernels.neurms_column_squares(
        len(features),
        addresses(biases),
        None if averages is None else addresses(averages),
        fresh,
        kept,
        numbers("q", [g.shape[0] for g in gradients]),
        addresses(rows),
        numbers("Q", last),
    )


@list_kernel
def average_square_sums(
    gradients: Sequence[Tensor],
    averages: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    bias_averages: Sequence[Tensor | None],
    widths: Sequence[int],
    fresh: float,
    kept: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """Row sums and column sums of the squares of ``fresh [G | g] + kept [M | m]``.

    What gradients make of averages that they are about to enter, which is never stored: one read of
    G and of M.

    Args:
        gradients: Matrices G, each of shape (m, n), float32 or float64, any strides.
        averages: M, the same shapes.
        biases: g of every matrix, shape (m,), or None for none.
        bias_averages: The same shapes, None where there is no bias.
        widths: Column sums of every matrix that are asked for: n, or n + 1 with a bias; without
            one the last is zero.
        fresh: Weight of the gradients.
        kept: Weight of the averages.

    Returns:
        Row sums of every matrix, shape (m,), and column sums, shape (width,), float64.

    Reference:
        The statistic of NeuRMS's variant P with ``moments="average"``.

    Example:
        >>> import torch
        >>> g, m = torch.tensor([[2.0, 4.0], [6.0, 8.0]]), torch.zeros(2, 2)
        >>> average_square_sums([g], [m], [None], [None], [2], 0.5, 0.5)
        ([tensor([ 5., 25.], dtype=torch.float64)], [tensor([10., 20.], dtype=torch.float64)])
    """
    each = zip(gradients, averages, biases, bias_averages, widths, strict=True)
    made = [
        _joint(_average_sums(g, m, fresh, kept), _mixed(b, own, fresh, kept), width)
        for g, m, b, own, width in each
    ]
    return [rows for rows, _ in made], [columns for _, columns in made]


def _mixed(bias: Tensor | None, average: Tensor | None, fresh: float, kept: float) -> Tensor | None:
    if bias is None or average is None:
        return bias
    return bias.to(torch.float64) * fresh + average.to(torch.float64) * kept


def _average_sums_of(
    gradient: Tensor, average: Tensor, fresh: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor]:
    if gradient.device.type != "cpu":
        return _sums_of(gradient * fresh + average * kept)
    if not is_tiled(gradient):
        return _sums_of(gradient.to(torch.float64) * fresh + average.to(torch.float64) * kept)
    total = torch.zeros(gradient.size(1), dtype=torch.float64)
    by_rows: list[Tensor] = []
    length = tile_length(gradient, 0)
    for g, m in zip(gradient.split(length), average.split(length)):  # noqa: B905
        squares = (g.to(torch.float64) * fresh + m.to(torch.float64) * kept).square()
        by_rows.append(squares.sum(-1))
        total += squares.sum(-2)
    return torch.cat(by_rows), total


_average_sums: Kernel[..., Any] = kernel(_average_sums_of)


def _are_averaged(
    gradients: Sequence[Tensor],
    averages: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    bias_averages: Sequence[Tensor | None],
    widths: Sequence[int],
) -> list[bool]:
    joint = _are_joint(gradients, biases, widths)
    return [
        good
        and m.shape == g.shape
        and are_plain([g, m])
        and (b is None or (a is not None and a.shape == b.shape and is_plain(a)))
        for good, g, m, b, a in zip(joint, gradients, averages, biases, bias_averages, strict=True)
    ]


@average_square_sums.native(_are_averaged)
def _average_square_sums(
    gradients: Sequence[Tensor],
    averages: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    bias_averages: Sequence[Tensor | None],
    widths: Sequence[int],
    fresh: float,
    kept: float,
) -> tuple[list[Tensor], list[Tensor]]:
    rows, columns = _read(gradients, widths, averages, fresh, kept)
    _add_biases_(gradients, biases, bias_averages, fresh, kept, rows, columns)
    return rows, columns


def vectors(like: Tensor, sizes: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    """Return vectors of the given sizes, parts of one new tensor."""
    return list(like.new_empty(sum(sizes), dtype=dtype).split(list(sizes)))


def averages_and_scales(q: Sequence[Tensor], s: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return four lists of new float32 vectors, sized as q, s, q and s: averages and scales."""
    units, features = [x.numel() for x in q], [x.numel() for x in s]
    made, count = vectors(q[0], 2 * (units + features), torch.float32), len(q)
    return [made[k * count : (k + 1) * count] for k in range(4)]
