"""R^(1/2) (x) L^(1/2): against the dense mn x mn Fisher matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from neurms.core.optimizers.plan import tensor_bytes
from neurms.core.structures.kronecker import Kronecker
from neurms.testing import TransformContract, gradients, run


def power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.pow(exponent)) @ vectors.T


class TestKronecker(TransformContract):
    transform = Kronecker(eps=1e-3)
    tolerance = 1e-8

    @pytest.mark.parametrize("shape", [(4, 3), (3, 4), (3, 3)])
    @pytest.mark.parametrize("beta", [1.0, 0.8])
    def test_equals_the_dense_kronecker_structure(
        self, shape: tuple[int, int], beta: float
    ) -> None:
        m, n = shape
        steps, eps = gradients(m, n, steps=6), 1e-2
        updates, _ = run(Kronecker(beta, eps), steps)
        weights = beta ** torch.arange(5, -1, -1, dtype=torch.float64)
        if beta != 1.0:
            weights = weights / weights.sum()  # what averaging and bias correction amount to
        left = sum(w * g @ g.T for w, g in zip(weights, steps, strict=True))
        right = sum(w * g.T @ g for w, g in zip(weights, steps, strict=True))
        damped = [f + eps * torch.eye(len(f), dtype=f.dtype) for f in (right, left)]
        fisher = torch.kron(power(damped[0], 0.5), power(damped[1], 0.5))
        vec = steps[-1].mT.reshape(-1)
        dense = (power(fisher, -0.5) @ vec).reshape(n, m).mT
        torch.testing.assert_close(updates[-1], dense, rtol=1e-8, atol=1e-9)

    def test_first_update_is_orthogonal(self) -> None:
        updates, _ = run(Kronecker(eps=1e-12), gradients(5, 3, steps=1))
        torch.testing.assert_close(
            torch.linalg.svdvals(updates[0]), torch.ones(3, dtype=torch.float64), rtol=1e-5, atol=0
        )

    @pytest.mark.parametrize("shape", [(1, 6), (6, 1)])
    def test_a_single_row_is_full_matrix_adagrad(self, shape: tuple[int, int]) -> None:
        steps = gradients(*shape, steps=4)
        updates, state = run(Kronecker(eps=1e-4), steps)
        flat = steps.flatten(1)
        full = flat.T @ flat + 1e-4 * torch.eye(6, dtype=torch.float64)
        expected = power(full, -0.5) @ flat[-1]
        torch.testing.assert_close(updates[-1].reshape(-1), expected, rtol=1e-8, atol=1e-9)
        assert len(state) == 1

    def test_roots_are_kept_for_the_interval(self) -> None:
        steps = gradients(4, 3, steps=5)
        every, _ = run(Kronecker(eps=1e-2), steps)
        lazy, _ = run(Kronecker(eps=1e-2, interval=3), steps)
        torch.testing.assert_close(lazy[0], every[0])
        assert not torch.allclose(lazy[1], every[1])
        assert not torch.allclose(lazy[2], every[2])
        torch.testing.assert_close(lazy[3], every[3])
        assert not torch.allclose(lazy[4], every[4])

    def test_state_bytes(self) -> None:
        matrix = torch.empty(7, 11, device="meta")
        assert tensor_bytes(Kronecker().init(matrix)) == 4 * (49 + 121)
        assert tensor_bytes(Kronecker(interval=10).init(matrix)) == 8 * (49 + 121)

    @pytest.mark.parametrize("scale", [1e-12, 1e12])
    def test_extreme_scales_in_float32(self, scale: float) -> None:
        steps = gradients(6, 9, steps=3, dtype=torch.float32)
        truth, _ = run(Kronecker(eps=1e-30), steps.double())
        updates, _ = run(Kronecker(eps=1e-30), steps * scale)
        for ours, expected in zip(updates, truth, strict=True):
            torch.testing.assert_close(ours.double(), expected, rtol=0.05, atol=0.02)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"beta": 1.1}, "beta=1.1"),
            ({"eps": 0.0}, "eps=0.0"),
            ({"interval": 0}, "interval=0"),
        ],
    )
    def test_bad_settings(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Kronecker(**settings)


class TestAveragedFactors(TransformContract):
    transform = Kronecker(beta=0.9, eps=1e-3, interval=2)
    tolerance = 1e-8
