"""r_i against the whole Gram matrix."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neurms.core.diagnostics.dominance import row_dominance
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
