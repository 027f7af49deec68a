"""r_i against the whole Gram matrix."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neurms.core.diagnostics.dominance import row_dominance, whitening_gap
from tests.callbacks.profiler import truth


@given(st.integers(2, 40), st.integers(1, 30), st.integers(0, 2**31))
def test_equals_the_whole_gram_matrix(rows: int, columns: int, seed: int) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    found = row_dominance(matrix)
    assert found is not None
    assert found[:3] == pytest.approx(truth.dominance(matrix.double().numpy()), rel=1e-5)


def test_blocks_and_a_part_of_the_rows() -> None:
    matrix = torch.randn(600, 8)
    found, gram = row_dominance(matrix), (matrix.double() @ matrix.double().T).abs()
    assert found is not None
    assert found[:3] == pytest.approx(truth.dominance(matrix.double().numpy()), rel=1e-5)
    part = row_dominance(matrix, max_rows=200)
    assert part is not None
    assert part.rows == 200
    r = gram.diagonal() * 599 / (gram.sum(1) - gram.diagonal())
    assert part.r_avg == pytest.approx(r[::3].mean().item(), rel=1e-5)


def test_zero_rows_orthogonal_rows_and_nothing_to_compare() -> None:
    assert row_dominance(torch.ones(1, 3)) is None
    assert row_dominance(torch.zeros(3, 3)) is None
    found = row_dominance(torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]))
    assert found is not None
    assert found.rows == 2
    assert math.isinf(found.r_min)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (6, 6)])
def test_whitening_gap_of_a_known_matrix(shape: tuple[int, int]) -> None:
    # Orthonormal rows or columns, each scaled: the quintic acts on one singular value at a time.
    m, n = shape
    frame = torch.linalg.qr(torch.randn(max(shape), min(shape), dtype=torch.float64))[0]
    matrix = frame if m > n else frame.mT
    rows = matrix / matrix.norm(dim=1, keepdim=True)
    x = 1.0 / min(shape) ** 0.5
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    truth = float((x * matrix - rows).norm() / rows.norm())
    assert whitening_gap(matrix) == pytest.approx(truth, rel=1e-5)


def test_whitening_gap_of_nothing_and_of_equal_rows() -> None:
    assert whitening_gap(torch.zeros(3, 4)) == 0.0
    # m equal rows: Muon gives each 1/sqrt(m) of a unit vector, RMNP a whole one.
    assert 0.2 < whitening_gap(torch.ones(4, 9)) < 0.7
    with pytest.raises(ValueError, match="steps=0"):
        whitening_gap(torch.eye(2), steps=0)
