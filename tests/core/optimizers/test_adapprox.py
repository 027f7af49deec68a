"""Adapprox's recipe with an exact truncated SVD put in by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from neurms import Adapprox
from neurms.testing import gradients


def test_equations() -> None:
    rank, b1, b2, clip = 2, 0.5, 0.9, 0.8
    weight = torch.nn.Parameter(torch.ones(6, 5, dtype=torch.float64))
    truth = torch.ones(6, 5, dtype=torch.float64)
    optimizer = Adapprox(
        [weight], lr=0.1, rank=rank, betas=(b1, b2), clip=clip, weight_decay=0.2, iterations=40
    )
    kept, average = torch.zeros_like(truth), torch.zeros_like(truth)
    for gradient in gradients(6, 5, steps=5):
        weight.grad = gradient.clone()
        optimizer.step()
        moment = b2 * kept.clamp(min=0) + (1 - b2) * gradient**2
        left, sigma, right = torch.linalg.svd(moment, full_matrices=False)
        kept = (left[:, :rank] * sigma[:rank]) @ right[:rank]
        update = gradient / (moment.sqrt() + 1e-8)
        update /= max(1.0, float(update.square().mean().sqrt()) / clip)
        average = b1 * average + (1 - b1) * update
        truth = (1 - 0.1 * 0.2) * truth - 0.1 * average
        torch.testing.assert_close(weight.detach(), truth, rtol=1e-6, atol=1e-8)


def test_seed_changes_the_draws() -> None:
    paths = []
    for seed in (0, 0, 1):
        weight = torch.nn.Parameter(torch.zeros(30, 20))
        optimizer = Adapprox([weight], rank=1, iterations=0, oversampling=0, seed=seed)
        for gradient in gradients(30, 20, steps=3, dtype=torch.float32):
            weight.grad = gradient.clone()
            optimizer.step()
        paths.append(weight.detach())
    assert torch.equal(paths[0], paths[1])
    assert not torch.equal(paths[0], paths[2])


@pytest.mark.parametrize(
    ("settings", "numbers"),
    [({}, 8 * 50 + 600), ({"betas": (0.0, 0.9)}, 8 * 50), ({"rank": 99}, 20 * 50 + 600)],
)
def test_planned_bytes(settings: dict[str, Any], numbers: int) -> None:
    weight = torch.nn.Parameter(torch.empty(20, 30, device="meta"))
    assert Adapprox([weight], **{"rank": 8, **settings}).plan().state_bytes == 4 * numbers


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank=0"),
        ({"betas": (0.9,)}, "betas="),
        ({"clip": 0.0}, r"clip=0\.0"),
        ({"iterations": -1}, "iterations=-1"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Adapprox([torch.nn.Parameter(torch.zeros(2, 2))], **settings)
