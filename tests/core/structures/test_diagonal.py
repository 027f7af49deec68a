"""Diag(v): against torch's own Adam and RMSprop, and a dense diagonal matrix."""

from __future__ import annotations

import pytest
import torch

from neurms.core.optimizers.plan import tensor_bytes
from neurms.core.structures.base import Context
from neurms.core.structures.diagonal import Diagonal
from neurms.testing import TransformContract, gradients, run


class TestDiagonal(TransformContract):
    transform = Diagonal()
    scale_invariant = True

    def test_equals_torch_adam(self) -> None:
        steps = gradients(5, 4, steps=6)
        parameter = torch.nn.Parameter(torch.zeros(5, 4, dtype=torch.float64))
        adam = torch.optim.Adam([parameter], lr=1.0, betas=(0.8, 0.9), eps=1e-6)
        updates, _ = run(Diagonal((0.8, 0.9), 1e-6), steps)
        total = torch.zeros_like(steps[0])
        for gradient, update in zip(steps, updates, strict=True):
            parameter.grad = gradient.clone()
            adam.step()
            total -= update
        torch.testing.assert_close(parameter.detach(), total)

    def test_equals_the_dense_diagonal(self) -> None:
        steps = gradients(3, 4, steps=3)
        transform = Diagonal((0.0, 0.7), 0.0, bias_correction=False)
        state = transform.init(steps[0])
        for number, gradient in enumerate(steps, 1):
            transform.observe(gradient, state, Context(number))
        fisher = torch.diag(state["exp_avg_sq"].reshape(-1))
        update = transform.precondition(steps[0], state, Context(3))
        dense = torch.linalg.solve(fisher.sqrt(), steps[0].reshape(-1))
        torch.testing.assert_close(update.reshape(-1), dense)

    @pytest.mark.parametrize(("betas", "copies"), [((0.9, 0.999), 2), ((0.0, 0.999), 1)])
    def test_state_bytes(self, betas: tuple[float, float], copies: int) -> None:
        state = Diagonal(betas).init(torch.empty(7, 3, device="meta"))
        assert tensor_bytes(state) == copies * 7 * 3 * 4

    @pytest.mark.parametrize(
        ("settings", "message"),
        [({"betas": (0.9, 1.0)}, r"betas\[1\]=1.0"), ({"eps": -1.0}, "eps=-1.0")],
    )
    def test_bad_settings(self, settings: dict[str, float], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Diagonal(**settings)  # type: ignore[arg-type]


class TestRMSProp(TransformContract):
    transform = Diagonal((0.0, 0.9), 0.0, bias_correction=False)
    scale_invariant = True

    def test_equals_torch_rmsprop(self) -> None:
        steps = gradients(5, 4, steps=6)
        parameter = torch.nn.Parameter(torch.zeros(5, 4, dtype=torch.float64))
        rmsprop = torch.optim.RMSprop([parameter], lr=1.0, alpha=0.9, eps=1e-6)
        updates, _ = run(Diagonal((0.0, 0.9), 1e-6, bias_correction=False), steps)
        total = torch.zeros_like(steps[0])
        for gradient, update in zip(steps, updates, strict=True):
            parameter.grad = gradient.clone()
            rmsprop.step()
            total -= update
        torch.testing.assert_close(parameter.detach(), total)
