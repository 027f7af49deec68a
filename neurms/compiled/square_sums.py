"""Row and column sums of a gradient's squares in one read of it."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from neurms.compiled._tiles import is_tiled, tile_length
from neurms.compiled.backends import kernel
from neurms.compiled.native import LEAST_ELEMENTS, fits, is_plain, library, threads

__all__ = ["square_sums"]


def _sums(gradient: Tensor) -> tuple[Tensor, Tensor]:
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


@kernel
def square_sums(gradients: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
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
    rows: list[Tensor] = []
    columns: list[Tensor] = []
    for gradient in gradients:
        by_row, by_column = _sums(gradient)
        rows.append(by_row)
        columns.append(by_column)
    return rows, columns


def _is_stored(gradient: Tensor) -> bool:
    return gradient.dim() == 2 and (is_plain(gradient) or is_plain(gradient.mT))


def _are_stored(gradients: list[Tensor]) -> bool:
    return bool(gradients) and all(map(_is_stored, gradients)) and fits()


def _are_large(gradients: list[Tensor]) -> bool:
    # Together, for they are one call.
    return sum(g.numel() for g in gradients) >= LEAST_ELEMENTS and _are_stored(gradients)


@square_sums.native(_are_large, fits=_are_stored)
def _square_sums(gradients: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
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


def addresses(tensors: Sequence[Tensor]) -> bytes:
    """Return where the elements of several tensors begin, as an array of C."""
    return numbers("Q", [tensor.data_ptr() for tensor in tensors])


def numbers(kind: str, values: Sequence[float]) -> bytes:
    """Return numbers as an array of C; ``kind`` is a code of :mod:`struct`."""
    return struct.pack(f"{len(values)}{kind}", *values)
