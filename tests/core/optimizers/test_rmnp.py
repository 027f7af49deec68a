"""RMNP against its equations in float64."""

from __future__ import annotations

import pytest
import torch

from neurms import RMNP
from neurms.testing import gradients


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (3, 2, 2)])
def test_equations(shape: tuple[int, ...], nesterov: bool) -> None:
    m, n = shape[0], 24 // shape[0] if len(shape) == 2 else 4
    steps = gradients(m, n, steps=5)
    weight = torch.nn.Parameter(gradients(m, n, steps=1, seed=5)[0].reshape(shape))
    truth = weight.detach().reshape(m, n).clone()
    optimizer = RMNP([weight], lr=0.1, momentum=0.8, nesterov=nesterov, weight_decay=0.2)
    average = torch.zeros_like(truth)
    for gradient in steps:
        weight.grad = gradient.reshape(shape).clone()
        optimizer.step()
        average = 0.8 * average + 0.2 * gradient
        r = 0.2 * gradient + 0.8 * average if nesterov else average
        r = r / r.norm(dim=1, keepdim=True)
        truth = (1 - 0.1 * 0.2) * truth - 0.1 * max(1.0, m / n) ** 0.5 * r
    torch.testing.assert_close(weight.detach().reshape(m, n), truth)


def test_without_the_shape_factor_rows_move_by_lr() -> None:
    weight = torch.nn.Parameter(torch.zeros(8, 2))
    optimizer = RMNP([weight], lr=0.1, shape_scale=False)
    weight.grad = torch.randn(8, 2)
    optimizer.step()
    torch.testing.assert_close(weight.detach().norm(dim=1), torch.full((8,), 0.1))


@pytest.mark.parametrize(("momentum", "copies"), [(0.9, 1), (0.0, 0)])
def test_state_bytes(momentum: float, copies: int) -> None:
    weight = torch.nn.Parameter(torch.zeros(8, 2))
    optimizer = RMNP([weight], momentum=momentum)
    weight.grad = torch.randn(8, 2)
    optimizer.step()
    assert optimizer.state_bytes() == optimizer.plan().state_bytes == copies * 16 * 4


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match=r"momentum=1\.0"):
        RMNP([torch.nn.Parameter(torch.zeros(2, 2))], momentum=1.0)
