"""SWAN against standardisation and an inverse square root by eigenvalues."""

from __future__ import annotations

import pytest
import torch

from neurms import SWAN


@pytest.mark.parametrize("rescale", [False, True])
def test_equations(rescale: bool) -> None:
    gradient = torch.randn(3, 8, dtype=torch.float64)
    weight = torch.nn.Parameter(torch.zeros_like(gradient))
    weight.grad = gradient.clone()
    SWAN([weight], lr=1.0, steps=60, beta=0.5, rescale=rescale).step()
    standard = (gradient - gradient.mean(1, keepdim=True)) / gradient.std(
        1, correction=0, keepdim=True
    )
    values, vectors = torch.linalg.eigh(standard @ standard.mT)
    truth = vectors @ torch.diag(values.rsqrt()) @ vectors.mT @ standard
    if rescale:
        truth = truth * standard.norm() / truth.norm()
    torch.testing.assert_close(weight.detach(), -truth, rtol=1e-6, atol=1e-7)


def test_scale_of_the_gradient_does_not_matter() -> None:
    gradient = torch.randn(6, 4)
    moved = []
    for scale in (1.0, 1e-6, 1e6):
        weight = torch.nn.Parameter(torch.zeros(6, 4))
        weight.grad = gradient * scale
        SWAN([weight], lr=1.0).step()
        moved.append(weight.detach())
    torch.testing.assert_close(moved[1], moved[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(moved[2], moved[0], rtol=1e-3, atol=1e-3)


def test_keeps_no_state() -> None:
    weight = torch.nn.Parameter(torch.zeros(6, 4))
    optimizer = SWAN([weight])
    weight.grad = torch.randn(6, 4)
    optimizer.step()
    assert optimizer.state_bytes() == optimizer.plan().state_bytes == 0
