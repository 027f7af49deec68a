"""BlockAdam against torch's Adam and its own dense blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from neurms import BlockAdam
from neurms.testing import gradients


@pytest.mark.parametrize(("features", "size"), [(6, 1), (7, 5)])
def test_blocks_of_one_feature_are_adam(features: int, size: int) -> None:
    steps = gradients(4, features, steps=25)
    ours = torch.nn.Parameter(torch.ones(4, features, dtype=torch.float64))
    truth = torch.nn.Parameter(torch.ones(4, features, dtype=torch.float64))
    optimizer = BlockAdam([ours], lr=0.1, betas=(0.8, 0.95), block_size=size, weight_decay=0.1)
    adamw = torch.optim.AdamW([truth], lr=0.1, betas=(0.8, 0.95), weight_decay=0.1)
    for gradient in steps:
        ours.grad, truth.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        adamw.step()
    torch.testing.assert_close(ours, truth)


def test_rows_turn_with_their_block() -> None:
    # A full block knows no axes: rotating all gradients within it rotates the path.
    steps = gradients(4, 3, steps=6)
    turn = torch.linalg.qr(gradients(3, 3, steps=1, seed=1)[0]).Q
    paths = []
    for given in (steps, steps @ turn):
        weight = torch.nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))
        optimizer = BlockAdam([weight], lr=0.1, block_size=3, interval=2)
        for gradient in given:
            weight.grad = gradient.clone()
            optimizer.step()
        paths.append(weight.detach())
    torch.testing.assert_close(paths[0] @ turn, paths[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "numbers"),
    [
        ({"block_size": 4, "interval": 1}, 240 * 5),
        ({"block_size": 4}, 240 * 9),
        ({"block_size": 1}, 240 * 2),
        ({"block_size": 4, "interval": 1, "betas": (0.0, 0.9)}, 240 * 4),
    ],
)
def test_planned_bytes(settings: dict[str, Any], numbers: int) -> None:
    weight = torch.nn.Parameter(torch.empty(20, 12, device="meta"))
    assert BlockAdam([weight], **settings).plan().state_bytes == 4 * numbers


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"betas": (0.9, 1.0)}, r"betas\[1\]=1\.0"),
        ({"eps": 0.0}, r"eps=0\.0"),
        ({"block_size": 0}, "block_size=0"),
        ({"interval": 0}, "interval=0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockAdam([torch.nn.Parameter(torch.zeros(2, 2))], **settings)
