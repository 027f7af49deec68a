"""Sums of squares of L X R, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from neurms.compiled.backends import PROMPT
from neurms.compiled.move_square_sums import move_square_sums

SHAPES = {
    "bias": (300,),
    "matrix": (37, 1500),
    "tall": (1500, 3),
    "blocks": (1, 9, 4, 25),
    "groups": (2, 3, 4, 5),
    "empty": (0, 4),
}
BOUNDS = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 1e-6}


def factors(shape: tuple[int, ...]) -> tuple[Tensor, Tensor | None, Any]:
    """Return left (m,), right (n,), and their product as it broadcasts, float64."""
    if len(shape) == 1:
        left = torch.rand(shape[0]) + 0.1
        return left, None, left.double()
    if len(shape) == 2:
        left, right = torch.rand(shape[0]) + 0.1, torch.rand(shape[1]) + 0.1
        return left, right, left.double()[:, None] * right.double()
    groups, units, features, _ = shape
    left, right = torch.rand(groups * units) + 0.1, torch.rand(groups * features) + 0.1
    own = left.double().view(groups, units, 1, 1), right.double().view(groups, 1, features, 1)
    return left, right, own[0] * own[1]


@pytest.mark.parametrize("form", ["eager", PROMPT])
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("sides", ["none", "left", "both"])
def test_against_float64_in_mixed_company(form: str, dtype: torch.dtype, sides: str) -> None:
    torch.manual_seed(0)
    items: list[tuple[Tensor, Tensor | None, Tensor | None]] = []
    truth = []
    for shape in SHAPES.values():
        x = torch.randn(shape).to(dtype)
        left, right, both = factors(shape)
        if sides == "none":
            items.append((x, None, None))
            both = torch.ones(())
        elif sides == "left":
            items.append((x, left.to(dtype), None))
            both = left.to(dtype).double().view(-1, *[1] * (len(shape) - 1))
            if len(shape) == 4:
                both = both.view(shape[0], shape[1], 1, 1)
        else:
            own = None if right is None else right.to(dtype)
            items.append((x, left.to(dtype), own))
            if dtype is torch.bfloat16:
                return
        truth.append((x.double() * both.double()).square().sum())
    columns = [list(column) for column in zip(*items, strict=True)]
    sums = move_square_sums.on(form)(*columns)
    assert sums.dtype is torch.float64
    torch.testing.assert_close(sums, torch.stack(truth), rtol=BOUNDS[dtype], atol=0)


@pytest.mark.parametrize("form", ["eager", PROMPT])
def test_matrices_stored_by_columns(form: str) -> None:
    x, left, right = torch.randn(40, 900).t(), torch.rand(900), torch.rand(40)
    (found,) = move_square_sums.on(form)([x], [left], [right])
    truth = (left.double()[:, None] * x.double() * right.double()).square().sum()
    assert abs(found / truth - 1) < 1e-6


def test_nothing_is_no_sums() -> None:
    assert move_square_sums([], [], []).shape == (0,)


@pytest.mark.parametrize("form", ["eager", PROMPT])
def test_shapes_that_do_not_fit(form: str) -> None:
    with pytest.raises(ValueError, match="factor for every unit"):
        move_square_sums.on(form)([torch.ones(3, 4)], [torch.ones(4)], [None])
