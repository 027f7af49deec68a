"""Row and column sums of squares against float64, in every form, storage order and magnitude."""

from __future__ import annotations

import torch
from torch import Tensor

from neurms.compiled import use_backend
from neurms.compiled.square_sums import square_sums


def matrix(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def test_meaning(backend: str) -> None:
    x, y = matrix(3, 4), matrix(5, 2, seed=1)
    with use_backend(backend):
        rows, columns = square_sums([x, y])
    for one, row, column in zip((x, y), rows, columns, strict=True):
        wide = one.double()
        torch.testing.assert_close(row, torch.einsum("ij,ij->i", wide, wide))
        torch.testing.assert_close(column, torch.einsum("ij,ij->j", wide, wide))


def test_batches_and_no_matrices() -> None:
    x = matrix(2, 3, 4)
    (rows,), (columns,) = square_sums([x])
    for i in range(2):
        (row,), (column,) = square_sums([x[i]])
        torch.testing.assert_close(rows[i], row)
        torch.testing.assert_close(columns[i], column)
    assert square_sums([]) == ([], [])


def test_tiles_add_up(small_tiles: None) -> None:
    x = matrix(40, 7)
    (rows,), (columns,) = square_sums([x])
    torch.testing.assert_close(rows, x.double().square().sum(1))
    torch.testing.assert_close(columns, x.double().square().sum(0))
