"""Products known to be symmetric, of which a half is computed."""

from __future__ import annotations

import pytest
import torch

from neurms.compiled.symmetric import add_gram_, panel_count


@pytest.mark.parametrize("side", [1, 511, 512, 1376, 5000])
def test_panels_are_few_and_not_thin(side: int) -> None:
    count = panel_count(side)
    assert 1 <= count <= 8
    assert count == 1 or side // count >= 128


@pytest.mark.parametrize("shape", [(3, 5), (512, 64), (600, 32), (2, 512, 16)])
@pytest.mark.parametrize("turned", [False, True])
def test_it_is_the_whole_product(shape: tuple[int, ...], turned: bool) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    matrix = matrix.mT.contiguous().mT if turned else matrix
    old = torch.randn(*shape[:-1], shape[-2])
    total = old + old.mT
    exact = 0.9 * total.double() + 0.2 * matrix.double() @ matrix.double().mT
    found = add_gram_(total, matrix, 0.9, 0.2)
    assert found is total
    torch.testing.assert_close(total.double(), exact, rtol=1e-5, atol=1e-5)


SIDE = 512


def test_both_halves_are_the_same_numbers() -> None:
    total = torch.zeros(SIDE, SIDE)
    add_gram_(total, torch.randn(SIDE, 40), 1.0, 1.0)
    off = total - total.mT
    half = SIDE // 2
    assert not off[half:, :half].any()
