"""Variant P on a deep plain network: at the usual rate of AdamW it trains, at .01 it says no."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import neurms


def plain(depth: int, width: int = 256) -> nn.Sequential:
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    inputs, labels = torch.randn(32, 256), torch.randint(0, 10, (32,))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs), labels)
        loss.backward()
        before = copy.deepcopy(model.state_dict())
        try:
            optimizer.step()
        except neurms.NonFiniteError:
            now = model.state_dict()
            assert all(torch.equal(before[key], now[key]) for key in before)
            raise
        losses.append(float(loss.detach()))
    return losses


def test_at_the_usual_rate_of_adamw_it_trains() -> None:
    torch.manual_seed(0)
    model = plain(11)
    losses = trained(model, neurms.NeuRMS(model, lr=1e-3), 40)
    assert losses[-1] < losses[0] - 0.3


def test_at_the_default_rate_it_leaves_the_finite_numbers_and_says_so() -> None:
    """What the guide says of it; if this fails, P has got a bound, and the guide may say that."""
    torch.manual_seed(0)
    model = plain(11)
    with pytest.raises(neurms.NonFiniteError, match="Lower lr"):
        trained(model, neurms.NeuRMS(model), 40)


@pytest.mark.parametrize(("lr", "damping"), [(3e-3, None), (1e-2, 1.0)])
def test_by_its_damped_average_it_goes_on(lr: float, damping: float | None) -> None:
    """A step that has a bound: at the default one to a third of that rate, at 1 all of it."""
    torch.manual_seed(0)
    model = plain(11)
    how = {"momentum": 0.8, "nesterov": True, "moments": "average", "damping": damping}
    losses = trained(model, neurms.NeuRMS(model, lr=lr, **how), 40)
    assert max(losses) < 500.0
    assert losses[-1] < 5.0


def test_adamw_goes_on_at_that_rate() -> None:
    torch.manual_seed(0)
    model = plain(11)
    losses = trained(model, torch.optim.AdamW(model.parameters(), lr=1e-2), 40)
    assert max(losses) < 10.0
