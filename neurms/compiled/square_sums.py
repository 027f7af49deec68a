"""Row and column sums of a gradient's squares, in one read of it."""

from __future__ import annotations

import torch
from torch import Tensor

from neurms.compiled._tiles import is_tiled, tile_length
from neurms.compiled.backends import kernel

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
