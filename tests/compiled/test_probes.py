"""Products with probes: unbiased, exact where the probes are a full orthogonal set."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from neurms.compiled.backends import PROMPT
from neurms.compiled.probes import mean_squares, probe_products
from neurms.core.unitwise.probed import drawn_probes

DRAWS = 2000


def signals(rows: int, m: int, n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    d = torch.randn(rows, m, generator=generator, dtype=torch.float64)
    return d * torch.logspace(-2, 1, m), torch.randn(rows, n, generator=generator).double()


def with_ones(h: Tensor) -> Tensor:
    return torch.cat([h, h.new_ones(h.shape[0], 1)], 1)


def hadamard(order: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def test_products_are_those_of_the_gradient() -> None:
    d, h = signals(5, 4, 6)
    gradient = d.T @ with_ones(h)
    right, left = drawn_probes(3, 1, (7, 4), 3, d)
    rows, columns = probe_products(d, h, right, left)
    torch.testing.assert_close(rows, gradient @ right)
    torch.testing.assert_close(columns, gradient.T @ left)
    without, _ = probe_products(d, h, right[:6], left)
    torch.testing.assert_close(without, d.T @ h @ right[:6])


@pytest.mark.parametrize("ones", [0, 1])
@pytest.mark.parametrize("probes", [1, 3, 4, 6])
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 5, 9), (130, 40, 300)])
def test_the_native_pass_is_that_of_four_products(
    shape: tuple[int, int, int], probes: int, ones: int
) -> None:
    rows, m, n = shape
    generator = torch.Generator().manual_seed(1)
    d, h = torch.randn(rows, m, generator=generator), torch.randn(rows, n, generator=generator)
    right, left = drawn_probes(5, 1, (n + ones, m), probes, d)
    found = probe_products.on(PROMPT)(d, h, right, left)
    inputs = with_ones(h) if ones else h
    gradient = d.double().T @ inputs.double()
    for own, wanted in zip(
        found, (gradient @ right.double(), gradient.T @ left.double()), strict=True
    ):
        size = float(wanted.abs().max())
        torch.testing.assert_close(own.double(), wanted, rtol=0, atol=3e-6 * size)


def test_a_full_orthogonal_set_gives_the_sums() -> None:
    d, h = signals(5, 4, 7)
    squares = (d.T @ with_ones(h)).square()
    products = probe_products(d, h, hadamard(8), hadamard(4))
    for found, wanted in zip(products, (squares.sum(1), squares.sum(0)), strict=True):
        torch.testing.assert_close(mean_squares(found), wanted, rtol=1e-13, atol=0)


def test_draws_are_unbiased_for_every_unit_and_feature() -> None:
    d, h = signals(6, 5, 8)
    squares = (d.T @ h).square()
    draws = [drawn_probes(11, step, (8, 5), 2, d) for step in range(DRAWS)]
    found = [map(mean_squares, probe_products(d, h, *probes)) for probes in draws]
    for estimates, wanted in zip(
        zip(*found, strict=True), (squares.sum(1), squares.sum(0)), strict=True
    ):
        sample = torch.stack(list(estimates))
        z = (sample.mean(0) - wanted) / (sample.std(0) / math.sqrt(DRAWS))
        p = [2 * (1 - NormalDist().cdf(abs(value))) for value in z.tolist()]
        assert min(p) > 0.01


def test_probes_depend_on_seed_and_step_alone() -> None:
    like = torch.zeros(1)
    first = drawn_probes(1, 2, (50, 40), 4, like)
    again = drawn_probes(1, 2, (50, 40), 4, like)
    assert all(map(torch.equal, first, again))
    for other in ((1, 3), (2, 2)):
        assert not torch.equal(drawn_probes(*other, (50, 40), 4, like)[0], first[0])
    assert set(first[0].unique().tolist()) == {-1.0, 1.0}
    assert [x.shape for x in first] == [(50, 4), (40, 4)]
