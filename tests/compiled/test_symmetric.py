"""Products known to be symmetric, of which a half is computed."""

from __future__ import annotations

import pytest
import torch

from neurms.compiled.symmetric import LEAST, add_gram_, panels


@pytest.mark.parametrize("side", [1, 255, 256, 511, 1376, 5000])
def test_panels_cover_the_rows_once(side: int) -> None:
    edges = panels(side)
    assert edges[0][0] == 0 and edges[-1][1] == side
    assert all(end == begin for (_, end), (begin, _) in zip(edges, edges[1:], strict=False))
    assert len(edges) == 1 or min(end - begin for begin, end in edges) >= 128


@pytest.mark.parametrize("shape", [(3, 5), (256, 64), (300, 32), (2, 256, 16)])
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


def test_both_halves_are_the_same_numbers() -> None:
    total = torch.zeros(LEAST, LEAST)
    add_gram_(total, torch.randn(LEAST, 40), 1.0, 1.0)
    off = total - total.mT
    half = LEAST // 2
    assert not off[half:, :half].any()
