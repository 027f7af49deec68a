"""Sketched Kronecker factors: against Shampoo's exact ones and against dense sketches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from neurms.core.optimizers.plan import tensor_bytes
from neurms.core.structures.base import Context
from neurms.core.structures.kronecker import Kronecker
from neurms.core.structures.kronecker_sketch import KroneckerSketch
from neurms.testing import TransformContract, gradients, run


def dense_factor(state: dict[str, Tensor], side: str) -> Tensor:
    basis = state[f"{side}_basis"]
    ridge = state[f"{side}_rho"] * torch.eye(len(basis), dtype=basis.dtype)
    return (basis * state[f"{side}_values"]) @ basis.T + ridge


class TestKroneckerSketch(TransformContract):
    transform = KroneckerSketch(rank=3, eps=1e-3)
    tolerance = 1e-7

    @pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
    @pytest.mark.parametrize("beta", [1.0, 0.9])
    def test_with_full_rank_it_is_shampoo(self, shape: tuple[int, int], beta: float) -> None:
        steps = gradients(*shape, steps=8)
        sketched, _ = run(KroneckerSketch(rank=6, beta=beta, eps=1e-4), steps)
        exact, _ = run(Kronecker(beta, eps=1e-4), steps)
        for a, b in zip(sketched, exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)

    @pytest.mark.parametrize("shape", [(9, 4), (4, 9), (20, 5)])
    def test_applies_the_dense_root_of_its_sketch(self, shape: tuple[int, int]) -> None:
        steps = gradients(*shape, steps=6)
        updates, state = run(KroneckerSketch(rank=2, beta=1.0, eps=1e-3), steps)
        roots = []
        for side, d in zip(("left", "right"), shape, strict=True):
            factor = dense_factor(state, side) + 1e-3 * torch.eye(d, dtype=torch.float64)
            values, vectors = torch.linalg.eigh(factor)
            roots.append((vectors * values**-0.25) @ vectors.T)
        expected = roots[0] @ steps[-1] @ roots[1]
        torch.testing.assert_close(updates[-1], expected, rtol=1e-8, atol=1e-9)

    def test_the_exact_factor_lies_below_the_sketch_with_rho(self) -> None:
        steps = gradients(10, 6, steps=12)
        _, state = run(KroneckerSketch(rank=3, beta=1.0), steps)
        left = sum(g @ g.T for g in steps)
        gap = torch.linalg.eigvalsh(dense_factor(state, "left") - left)
        assert gap.min() >= -1e-8 * left.trace()
        assert state["left_rho"] > 0

    def test_interval_skips_gradients(self) -> None:
        steps = gradients(5, 4, steps=5)
        transform = KroneckerSketch(rank=4, beta=0.9, interval=2)
        updates, _ = run(transform, steps)
        seen, state = run(KroneckerSketch(rank=4, beta=0.9), steps[::2])
        torch.testing.assert_close(updates[4], seen[2])
        between = KroneckerSketch(rank=4, beta=0.9).precondition(steps[3], state, Context(3))
        assert not torch.allclose(updates[3], between)

    def test_state_bytes(self) -> None:
        matrix = torch.empty(7, 11, device="meta")
        assert tensor_bytes(KroneckerSketch(rank=3).init(matrix)) == 4 * (3 * (7 + 11 + 2) + 2)
        full = 7 * 7 + 11 * 11 + 7 + 11 + 2
        assert tensor_bytes(KroneckerSketch(rank=128).init(matrix)) == 4 * full

    @pytest.mark.parametrize("scale", [1e-12, 1e12])
    def test_extreme_scales_in_float32(self, scale: float) -> None:
        steps = gradients(6, 9, steps=3, dtype=torch.float32)
        transform = KroneckerSketch(rank=4, eps=1e-30)
        truth, _ = run(transform, steps.double())
        updates, _ = run(transform, steps * scale)
        for ours, expected in zip(updates, truth, strict=True):
            torch.testing.assert_close(ours.double(), expected, rtol=0.05, atol=0.02)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"rank": 0}, "rank=0"),
            ({"beta": 1.1}, "beta=1.1"),
            ({"eps": 0.0}, "eps=0.0"),
            ({"interval": 0}, "interval=0"),
        ],
    )
    def test_bad_settings(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            KroneckerSketch(**settings)
