"""Row and column sums of squares against float64, in every form, storage order and magnitude."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from torch import Tensor

from neurms.compiled import use_backend
from neurms.compiled.native import compiler, suits
from neurms.compiled.square_sums import average_square_sums, joint_square_sums, square_sums


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


SHAPES = [(256, 256), (257, 300), (3, 40_000), (40_000, 3), (1, 70_000), (1023, 65)]


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler on this machine")
@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_native_form(shape: tuple[int, int], scale: float, by_columns: bool) -> None:
    x = matrix(*shape, scale=scale)
    assert suits(x), "the native form must be what this tests"
    x = x.mT if by_columns else x
    (rows,), (columns,) = square_sums([x])
    torch.testing.assert_close(rows, x.double().square().sum(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(columns, x.double().square().sum(0), rtol=1e-12, atol=0)


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler on this machine")
def test_many_small_matrices_in_one_call() -> None:
    shapes = [(64, 65), (5, 3), (128, 128), (1, 1), (300, 70)]
    xs = [matrix(*shape, seed=i) for i, shape in enumerate(shapes)]
    xs[2] = xs[2].mT
    assert all(square_sums._serve(xs)), "the native form must be what this tests"
    rows, columns = square_sums(xs)
    for x, row, column in zip(xs, rows, columns, strict=True):
        torch.testing.assert_close(row, x.double().square().sum(1), rtol=1e-12, atol=0)
        torch.testing.assert_close(column, x.double().square().sum(0), rtol=1e-12, atol=0)


def joint_truth(x: Tensor, bias: Tensor | None, width: int) -> tuple[Tensor, Tensor]:
    column = x.new_zeros(x.shape[0]) if bias is None else bias
    wide = torch.cat([x, column[:, None]], 1).double()
    rows, columns = torch.einsum("ij,ij->i", wide, wide), torch.einsum("ij,ij->j", wide, wide)
    return rows, columns[:width]


@pytest.mark.parametrize("form", ["eager", "auto", "prompt", "inductor"])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_bias_is_one_more_column(form: str, scale: float) -> None:
    shapes = [(64, 65), (5, 3), (40, 128), (1, 1), (300, 70)]
    xs = [matrix(*shape, scale=scale, seed=i) for i, shape in enumerate(shapes)]
    xs[2] = xs[2].mT
    biases = [matrix(len(x), scale=scale, seed=9) if i % 2 else None for i, x in enumerate(xs)]
    # The last one's bias has no gradient and is a column of zeros, as a frozen one.
    widths = [x.shape[1] + (b is not None) for x, b in zip(xs, biases, strict=True)]
    widths[-1] += 1
    rows, columns = joint_square_sums.on(form)(xs, biases, widths)
    for i, (x, bias, width) in enumerate(zip(xs, biases, widths, strict=True)):
        row, column = joint_truth(x, bias, width)
        torch.testing.assert_close(rows[i], row, rtol=1e-12, atol=0)
        torch.testing.assert_close(columns[i], column, rtol=1e-12, atol=0)


def test_what_does_not_fit_is_left_to_the_definition() -> None:
    x, y = matrix(4, 3), matrix(5, 3)
    wrong = [matrix(3), matrix(5)], [4, 4]
    assert joint_square_sums._serve([x, y], *wrong) == [False, True]
    assert joint_square_sums._serve([x, y], [matrix(4), None], [3, 5]) == [False, False]
    with pytest.raises(RuntimeError, match="size"):
        joint_square_sums.on("prompt")([x, y], *wrong)


def averages(scale: float = 1.0) -> list[list[Tensor | None]]:
    """Return gradients, averages, their biases and those of the averages, some without."""
    shapes = [(64, 65), (5, 3), (40, 128), (1, 1), (300, 70), (17, 2100)]
    xs, ms = ([matrix(*s, scale=scale, seed=i) for s in shapes] for i in (1, 2))
    bs, cs = (
        [matrix(s[0], scale=scale, seed=i) if k % 2 else None for k, s in enumerate(shapes)]
        for i in (3, 4)
    )
    return [list(xs), list(ms), bs, cs]


def average_truth(columns: list[list[Tensor | None]], width: list[int]) -> list[list[Tensor]]:
    found: list[list[Tensor]] = [[], []]
    for x, m, b, c, n in zip(*columns, width, strict=True):
        assert x is not None
        assert m is not None
        own = 0.36 * x.double() + 0.64 * m.double()
        mixed = None if b is None or c is None else 0.36 * b.double() + 0.64 * c.double()
        for part, sums in zip(found, joint_truth(own, mixed, n), strict=True):
            part.append(sums)
    return found


@pytest.mark.parametrize("form", ["eager", "auto", "prompt", "inductor"])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_what_a_gradient_makes_of_an_average(form: str, scale: float) -> None:
    columns = averages(scale)
    kept = [[None if x is None else x.clone() for x in column] for column in columns]
    widths = [x.shape[1] + (b is not None) for x, b in zip(*columns[::2], strict=True)]
    widths[0] += 1
    found = average_square_sums.on(form)(*columns, widths, 0.36, 0.64)
    for part, truth in zip(found, average_truth(columns, widths), strict=True):
        for sums, own in zip(part, truth, strict=True):
            torch.testing.assert_close(sums, own, rtol=1e-12, atol=0)
    pairs = zip(chain(*columns), chain(*kept), strict=True)
    assert all(x is y if x is None else torch.equal(x, y) for x, y in pairs)


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler on this machine")
def test_averages_are_read_natively_where_they_fit() -> None:
    columns = averages()
    widths = [x.shape[1] + (b is not None) for x, b in zip(*columns[::2], strict=True)]
    assert average_square_sums._serve(*columns, widths) == [True] * 6
    xs, ms, bs, cs = columns
    assert average_square_sums._serve([xs[0].mT], [ms[0].mT], [None], [None], [64]) == [False]
    assert average_square_sums._serve(xs[:1], ms[1:2], bs[:1], cs[:1], widths[:1]) == [False]
    assert average_square_sums._serve(xs[1:2], ms[1:2], bs[1:2], [None], widths[1:2]) == [False]


def test_tiles_of_averages_add_up(small_tiles: None) -> None:
    x, m = matrix(40, 7), matrix(40, 7, seed=1)
    truth = (0.36 * x.double() + 0.64 * m.double()).square()
    (rows,), (columns,) = average_square_sums.eager([x], [m], [None], [None], [7], 0.36, 0.64)
    torch.testing.assert_close(rows, truth.sum(1))
    torch.testing.assert_close(columns, truth.sum(0))
