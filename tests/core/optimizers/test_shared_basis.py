"""SharedBasis's recipe: grafting, momentum, convolutions, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from neurms import SharedBasis
from neurms.core.structures.shared_basis import SharedBasisBlocks
from neurms.testing import gradients, run


def test_grafted_onto_normalised_rmsprop_then_momentum() -> None:
    steps = gradients(5, 6, steps=4)
    parameter = torch.nn.Parameter(torch.zeros(5, 6, dtype=torch.float64))
    probe = torch.nn.Parameter(torch.zeros(5, 6, dtype=torch.float64))
    optimizer = SharedBasis([parameter], lr=0.1, rank=2, momentum=0.8)
    rmsprop = torch.optim.RMSprop([probe], lr=1.0, alpha=0.99)
    directions, _ = run(SharedBasisBlocks(rank=2), steps)
    velocity, truth = torch.zeros_like(steps[0]), torch.zeros_like(steps[0])
    for gradient, direction in zip(steps, directions, strict=True):
        parameter.grad, probe.grad = gradient.clone(), gradient / gradient.norm()
        optimizer.step()
        probe.data.zero_()
        rmsprop.step()
        velocity = 0.8 * velocity + direction * (probe.norm() / direction.norm()).detach()
        truth = truth - 0.1 * velocity
        torch.testing.assert_close(parameter.detach(), truth)


def test_without_grafting_and_momentum_it_is_the_structure() -> None:
    steps = gradients(5, 6, steps=3)
    parameter = torch.nn.Parameter(torch.zeros(5, 6, dtype=torch.float64))
    optimizer = SharedBasis([parameter], lr=1.0, rank=6, momentum=0.0, grafting=None)
    for gradient, update in zip(steps, run(SharedBasisBlocks(rank=6), steps)[0], strict=True):
        parameter.data.zero_()
        parameter.grad = gradient.clone()
        optimizer.step()
        torch.testing.assert_close(-parameter.detach(), update)


def test_blocks_of_a_convolution_are_its_output_channels() -> None:
    convolution = torch.nn.Conv2d(3, 4, 2, bias=False)
    optimizer = SharedBasis(convolution, rank=5, head="rule")
    convolution.weight.grad = torch.randn_like(convolution.weight)
    optimizer.step()
    state = optimizer.state[convolution.weight]
    assert state["basis"].shape == (12, 5)
    assert state["blocks"].shape == (4, 5, 5)


@pytest.mark.parametrize(
    ("settings", "numbers"),
    [
        ({"momentum": 0.0, "grafting": None}, 30 * 8 + 20 * 64 + 20),
        ({}, 30 * 8 + 20 * 64 + 20 + 2 * 600),
        ({"rank": 100, "momentum": 0.0, "grafting": "sgd"}, 900 + 20 * 900 + 20),
    ],
)
def test_planned_bytes(settings: dict[str, Any], numbers: int) -> None:
    weight = torch.nn.Parameter(torch.empty(20, 30, device="meta"))
    optimizer = SharedBasis([weight], **{"rank": 8, **settings})
    assert optimizer.plan().state_bytes == 4 * numbers


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank=0"),
        ({"decay": 1.1}, r"decay=1\.1"),
        ({"eps": 0.0}, r"eps=0\.0"),
        ({"momentum": 1.0}, r"momentum=1\.0"),
        ({"grafting": "none"}, "grafting='none'"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SharedBasis([torch.nn.Parameter(torch.zeros(2, 2))], **settings)
