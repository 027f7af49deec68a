"""The setting of the draft's Theorem 1: a convex problem, Robbins-Monro steps, clipped scales."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from neurms import NeuRMS

ROWS = 400


def digits() -> tuple[Tensor, Tensor]:
    """Return the first digits in 16 whitened principal components, then scaled unequally for F."""
    data = load_digits()
    x = torch.tensor(data.data[:ROWS], dtype=torch.float64)
    left, _, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    return left[:, :16] * ROWS**0.5 * torch.linspace(0.5, 2, 16), torch.tensor(data.target[:ROWS])


def objective(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the loss of logistic regression; smoothed labels keep its minimum finite.

    A penalty on the weights would do so, too, but B scales errors and not what reaches a weight by
    another way: it would go to the minimum of something else.
    """
    return nn.functional.cross_entropy(model(x), y, label_smoothing=0.2)


def gradient_norm(model: nn.Module, x: Tensor, y: Tensor) -> float:
    gradients = torch.autograd.grad(objective(model, x, y), list(model.parameters()))
    return float(torch.cat([g.flatten() for g in gradients]).norm())


def minibatches(x: Tensor, y: Tensor, rows: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randint(len(x), (rows,), generator=generator)
        yield x[chosen], y[chosen]


def norms(
    steps: int, at: tuple[int, ...], rows: int, lr: float, power: float, **settings: Any
) -> list[float]:
    """Return the full gradient's norm after some steps with rates lr (1 + t / 20)^(-power)."""
    x, y = digits()
    model = nn.Linear(16, 10).double()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer = NeuRMS(
        model, lr=lr, s_min=0.1, s_max=10.0, c_min=0.1, c_max=10.0, **{"variant": "U", **settings}
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: (1 + t / 20) ** -power)
    found = []
    for number, (bx, by) in enumerate(minibatches(x, y, rows, steps), 1):
        batch = (x, y) if rows == len(x) else (bx, by)
        objective(model, *batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if number in at:
            found.append(gradient_norm(model, x, y))
    return found


@pytest.mark.parametrize("variant", ["U", "B", "F"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_full_gradient_goes_to_zero(variant: str, momentum: float) -> None:
    lr = 0.3 * (1 - momentum)
    early, late = norms(600, (10, 600), ROWS, lr, 0.0, variant=variant, momentum=momentum)
    assert early > 1e-2
    assert late < 1e-5


@pytest.mark.parametrize("variant", ["U", "B", "F"])
def test_robbins_monro_steps_average_the_noise_of_minibatches_out(variant: str) -> None:
    early, middle, late = norms(2500, (25, 250, 2500), 32, 0.3, 0.9, variant=variant)
    assert late < 0.7 * middle < 0.5 * early
    # It is the falling rate that does it: with a constant one the noise stays.
    *_, constant = norms(1000, (1000,), 32, 0.3, 0.0, variant=variant)
    assert constant > 5 * late
