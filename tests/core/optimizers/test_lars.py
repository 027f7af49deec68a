"""LARS against its equations in float64."""

from __future__ import annotations

import pytest
import torch

from neurms import LARS
from neurms.testing import gradients


@pytest.mark.parametrize("nesterov", [False, True])
def test_equations(nesterov: bool) -> None:
    weight = torch.nn.Parameter(gradients(5, 3, steps=1, seed=5)[0])
    truth = weight.detach().clone()
    velocity = torch.zeros_like(truth)
    optimizer = LARS(
        [weight],
        lr=0.5,
        momentum=0.8,
        trust_coefficient=0.02,
        nesterov=nesterov,
        weight_decay=0.1,
    )
    for gradient in gradients(5, 3, steps=5):
        weight.grad = gradient.clone()
        optimizer.step()
        u = gradient + 0.1 * truth
        u = 0.02 * truth.norm() / u.norm() * u
        velocity = 0.8 * velocity + u
        truth = truth - 0.5 * (u + 0.8 * velocity if nesterov else velocity)
    torch.testing.assert_close(weight.detach(), truth)


def test_zero_weights_move_by_the_gradient() -> None:
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.ones(2, 2)
    LARS([weight], lr=0.5).step()
    assert torch.equal(weight.detach(), torch.full((2, 2), -0.5))


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match=r"trust_coefficient=0\.0"):
        LARS([torch.nn.Parameter(torch.zeros(2, 2))], trust_coefficient=0.0)
