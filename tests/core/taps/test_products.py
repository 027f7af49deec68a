"""A gradient that is not formed is D^T H all the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from neurms.core.taps.products import Product, add_product_, square_norm


def signals(rows: int, m: int, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    sizes = ((rows, m), (rows, n), (m, n))
    d, h, w = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    return d.to(dtype), h.to(dtype), w.to(dtype)


@pytest.mark.parametrize("rows", [0, 1, 9])
@pytest.mark.parametrize("factors", [False, True])
def test_it_is_added(rows: int, factors: bool) -> None:
    d, h, w = signals(rows, 5, 7, torch.float64)
    s = torch.arange(1.0, 6.0).double() if factors else None
    c = torch.arange(1.0, 8.0).double() if factors else None
    left, right = (d, h) if s is None or c is None else (d * s, h * c)
    truth = 0.9 * w - 0.3 * torch.einsum("bi,bj->ij", left, right)
    add_product_(w, Product(d, h), (s, c), 0.3, 0.9)
    torch.testing.assert_close(w, truth, rtol=1e-13, atol=1e-13)


def test_bfloat16_signals_are_summed_in_the_targets_precision() -> None:
    d, h, _ = signals(300, 40, 50, torch.bfloat16)
    target = torch.zeros(40, 50)
    add_product_(target, Product(d, h), (None, None), -1.0, 0.0)
    torch.testing.assert_close(target.double(), d.double().mT @ h.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 5, 7), (9, 5, 7), (4, 3, 300_000), (6, 700, 500)])
@pytest.mark.parametrize(("decay", "sign"), [(0.0, 1.0), (0.3, 1.0), (0.3, -1.0)])
def test_square_norm(shape: tuple[int, int, int], decay: float, sign: float) -> None:
    d, h, w = signals(*shape, torch.float32)
    truth = (sign * (d.double().mT @ h.double()) + decay * w.double()).square().sum()
    found = square_norm(Product(d, h), w, decay, sign)
    torch.testing.assert_close(found, truth, rtol=1e-6, atol=0)
