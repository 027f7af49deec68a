"""Nora: rows that turn a unit's weights and never stretch them."""

from __future__ import annotations

import torch

from neurms import RMNP, Nora
from neurms.testing import gradients


def test_steps_are_orthogonal_to_the_rows() -> None:
    weight = torch.nn.Parameter(gradients(4, 6, steps=1, seed=5)[0])
    optimizer = Nora([weight], lr=0.1)
    for gradient in gradients(4, 6, steps=4):
        before = weight.detach().clone()
        weight.grad = gradient.clone()
        optimizer.step()
        step = weight.detach() - before
        torch.testing.assert_close(
            (step * before).sum(1), torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0
        )
        torch.testing.assert_close(step.norm(dim=1), torch.full((4,), 0.1, dtype=torch.float64))


def test_from_zero_weights_it_starts_as_rmnp() -> None:
    gradient = torch.randn(4, 6)
    moved = []
    for rule in (Nora, RMNP):
        weight = torch.nn.Parameter(torch.zeros(4, 6))
        weight.grad = gradient.clone()
        rule([weight]).step()
        moved.append(weight.detach())
    assert torch.equal(*moved)


def test_state_bytes() -> None:
    weight = torch.nn.Parameter(torch.zeros(8, 2))
    optimizer = Nora([weight])
    weight.grad = torch.randn(8, 2)
    optimizer.step()
    assert optimizer.state_bytes() == optimizer.plan().state_bytes == 16 * 4
