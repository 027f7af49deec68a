"""Momentum: the heavy ball against torch.optim.SGD, the average against its closed form."""

from __future__ import annotations

import pytest
import torch

from neurms.core.structures.base import Context
from neurms.core.transforms.momentum import Momentum
from neurms.testing import TransformContract, gradients, run


class TestAverage(TransformContract):
    transform = Momentum(0.9)

    def test_closed_form(self) -> None:
        steps = gradients(3, 2, steps=5)
        updates, _ = run(Momentum(0.7), steps)
        weights = [0.3 * 0.7 ** (4 - t) for t in range(5)]
        truth = sum(w * g for w, g in zip(weights, steps, strict=True))
        torch.testing.assert_close(updates[-1], truth)

    def test_nesterov_looks_ahead_by_one_more_average(self) -> None:
        steps = gradients(3, 2, steps=5)
        averages, _ = run(Momentum(0.7), steps)
        ahead, _ = run(Momentum(0.7, nesterov=True), steps)
        torch.testing.assert_close(ahead[-1], 0.3 * steps[-1] + 0.7 * averages[-1])


class TestHeavyBall(TransformContract):
    transform = Momentum(0.9, nesterov=True, average=False)

    @pytest.mark.parametrize("nesterov", [False, True])
    def test_equals_torch_sgd(self, nesterov: bool) -> None:
        steps = gradients(3, 2, steps=5)
        parameter = torch.nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))
        sgd = torch.optim.SGD([parameter], lr=1.0, momentum=0.9, nesterov=nesterov)
        updates, _ = run(Momentum(0.9, nesterov, average=False), steps)
        for gradient in steps:
            parameter.grad = gradient.clone()
            sgd.step()
        torch.testing.assert_close(parameter.detach(), -sum(updates))


def test_without_momentum_nothing_is_kept() -> None:
    gradient = torch.ones(2, 2)
    assert Momentum(0.0).init(gradient) == {}
    assert Momentum(0.0)(gradient, {}, Context(1)) is gradient


def test_momentum_that_comes_too_late_says_so() -> None:
    with pytest.raises(ValueError, match=r"momentum=0\.9 was 0 when"):
        Momentum(0.9)(torch.ones(2, 2), {"step": torch.tensor(1)}, Context(2))


def test_bad_momentum() -> None:
    with pytest.raises(ValueError, match=r"momentum=1\.0 must lie in \[0, 1\)"):
        Momentum(1.0)
