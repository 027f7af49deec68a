"""Factors of the gradient's moments: what they mean, and the native form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from neurms.compiled import use_backend
from neurms.compiled.backends import PROMPT
from neurms.compiled.gradient_factors import gradient_factors
from neurms.compiled.native import compiler

SIZES = [(7, 5), (200, 301), (1, 4), (4, 1), (1024, 33)]


def operands(
    units: int, features: int, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(units)
    made = [
        10.0 ** (3 * torch.rand(k, generator=generator, dtype=torch.float64) - 1.5) * scale**power
        for k, power in ((units, 2), (features, 2), (units, 1), (features, 1))
    ]
    if units > 2:
        made[0][1], made[2][1] = 0, 0
    rows, columns, q, s = made
    return rows, columns, q.float(), s.float()


@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("damping", [0.0, 0.7])
def test_meaning(backend: str, damping: float, one_sided: bool) -> None:
    rows, columns, q, s = operands(7, 5)
    old_q, old_s = q.double(), s.double()
    with use_backend(backend):
        made = gradient_factors([rows], [columns], [q], [s], [0.3], 0.95, 2.0, damping, one_sided)
    new_q, new_s, left, right = (item for (item,) in made)
    moments = [0.95 * old_q**2 + 0.05 * rows, 0.95 * old_s**2 + 0.05 * columns]
    torch.testing.assert_close(new_q, moments[0].sqrt().float())
    torch.testing.assert_close(new_s, moments[1].sqrt().float())
    total = (moments[0].sum() + moments[1].sum()) / 2
    expected = []
    for moment, delta in zip(moments, (0.0, damping), strict=True):
        damped = ((moment + delta * moment.mean()) / (1 + delta)).tolist()
        alive = sorted(1 / x**0.5 for x, y in zip(damped, moment, strict=True) if y > 0)
        median = alive[(len(alive) - 1) // 2]
        bounded = [1 / x**0.5 if y > 0 else 0 for x, y in zip(damped, moment, strict=True)]
        low = 0.0 if one_sided else median / 2
        bounded = [x and min(max(x, low), median * 2) for x in bounded]
        expected.append(torch.tensor(bounded, dtype=torch.float64))
    torch.testing.assert_close(left, (expected[0] * (0.3 * total).sqrt()).float())
    torch.testing.assert_close(right, expected[1].float())


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler on this machine")
@pytest.mark.parametrize("kappa", [1.0, 3.0, 1e6])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15])
@pytest.mark.parametrize("how", [(0.0, False), (0.3, True), (100.0, False)])
def test_native_form(how: tuple[float, bool], scale: float, kappa: float) -> None:
    rows, columns, q, s = map(list, zip(*(operands(*size, scale) for size in SIZES), strict=True))
    wide = [[x.double() for x in xs] for xs in (q, s)]
    corrections = [0.1 * (i + 1) for i in range(len(SIZES))]
    lists = rows, columns, q, s, corrections
    assert all(gradient_factors._serve(*lists)), "the native form must be what this tests"
    found = gradient_factors.on(PROMPT)(*lists, 0.95, kappa, *how)
    truth = gradient_factors.eager(rows, columns, *wide, corrections, 0.95, kappa, *how)
    for ones, others in zip(found, truth, strict=True):
        for one, other in zip(ones, others, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=3e-7, atol=0)


@pytest.mark.parametrize("backend", ["eager", PROMPT])
def test_a_bad_number_is_not_hidden(backend: str) -> None:
    rows, columns, q, s = operands(200, 9)
    rows[3] = float("nan")
    form = gradient_factors.on(backend)
    *_, (left,), (right,) = form([rows], [columns], [q], [s], [1.0], 0.95, 10.0)
    assert left.isnan().all()
    assert right.isfinite().all()


def test_much_damping_leaves_columns_as_they_are() -> None:
    rows, columns, q, s = operands(200, 9)
    *_, (left,), (right,) = gradient_factors([rows], [columns], [q], [s], [1.0], 0.0, 1e9, 1e12)
    torch.testing.assert_close(right, torch.full_like(right, float(columns.mean()) ** -0.5))
    plain = gradient_factors([rows], [columns], [q], [s], [1.0], 0.0, 1e9)
    assert torch.equal(left, plain[2][0])
