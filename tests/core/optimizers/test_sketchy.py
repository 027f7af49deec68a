"""Sketchy's recipe: Shampoo at full rank, memory, settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from neurms import Shampoo, Sketchy
from neurms.testing import gradients


@pytest.mark.parametrize("betas", [(0.0, 1.0), (0.9, 0.95)])
@pytest.mark.parametrize("grafting", [None, "rmsprop"])
def test_full_rank_is_shampoo(betas: tuple[float, float], grafting: Any) -> None:
    shared: dict[str, Any] = {"betas": betas, "grafting": grafting, "momentum": 0.5, "eps": 1e-5}
    ours, theirs = (torch.nn.Parameter(torch.zeros(6, 4, dtype=torch.float64)) for _ in range(2))
    sketchy = Sketchy([ours], lr=0.1, rank=6, **shared)
    shampoo = Shampoo([theirs], lr=0.1, merge_dims=False, **shared)
    for gradient in gradients(6, 4, steps=6):
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        sketchy.step()
        shampoo.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "numbers"),
    [
        ({}, 8 * (20 + 30 + 2) + 2),
        ({"momentum": 0.9, "grafting": "adam"}, 8 * 52 + 2 + 2 * 600),
        ({"betas": (0.9, 1.0)}, 8 * 52 + 2 + 600),
    ],
)
def test_planned_bytes(settings: dict[str, Any], numbers: int) -> None:
    weight = torch.nn.Parameter(torch.empty(20, 30, device="meta"))
    assert Sketchy([weight], **{"rank": 8, **settings}).plan().state_bytes == 4 * numbers


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank=0"),
        ({"betas": (0.0, 2.0)}, r"betas\[1\]=2\.0"),
        ({"eps": 0.0}, r"eps=0\.0"),
        ({"interval": 0}, "interval=0"),
        ({"grafting": "x"}, "grafting='x'"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sketchy([torch.nn.Parameter(torch.zeros(2, 2))], **settings)
