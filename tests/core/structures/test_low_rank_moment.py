"""Diag(V) with a low-rank V: against float64 truncated SVDs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from neurms.core.optimizers.plan import tensor_bytes
from neurms.core.structures.base import Context
from neurms.core.structures.low_rank_moment import LowRankMoment
from neurms.testing import TransformContract, gradients, run


class TestLowRankMoment(TransformContract):
    transform = LowRankMoment(rank=2, beta=0.9, eps=1e-30)
    scale_invariant = True
    # The draws do not follow a permutation of the features; those over units do.
    permutes_features = False
    tolerance = 1e-7

    @pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
    def test_with_full_rank_it_is_rmsprop(self, shape: tuple[int, int]) -> None:
        steps = gradients(*shape, steps=5)
        updates, _ = run(LowRankMoment(rank=9, beta=0.9, eps=1e-8), steps)
        probe = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        rmsprop = torch.optim.RMSprop([probe], lr=1.0, alpha=0.9, eps=1e-8)
        for gradient, update in zip(steps, updates, strict=True):
            probe.data.zero_()
            probe.grad = gradient
            rmsprop.step()
            torch.testing.assert_close(-probe.detach(), update, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("rank", [1, 2, 4])
    def test_equals_exact_truncation(self, rank: int) -> None:
        steps = gradients(8, 7, steps=5)
        transform = LowRankMoment(rank, beta=0.8, eps=1e-8, iterations=40)
        updates, state = run(transform, steps)
        kept = torch.zeros(8, 7, dtype=torch.float64)
        for gradient, update in zip(steps, updates, strict=True):
            moment = 0.8 * kept.clamp(min=0) + 0.2 * gradient**2
            torch.testing.assert_close(update, gradient / (moment.sqrt() + 1e-8), rtol=1e-4, atol=0)
            left, sigma, right = torch.linalg.svd(moment, full_matrices=False)
            kept = (left[:, :rank] * sigma[:rank]) @ right[:rank]
        product = state["left"] @ state["right"].mT
        torch.testing.assert_close(product, kept, rtol=1e-4, atol=1e-4)

    def test_updates_are_bounded_whatever_the_truncation(self) -> None:
        updates, _ = run(LowRankMoment(rank=1, beta=0.99), gradients(20, 10, steps=10))
        assert all(update.abs().max() <= 10.0 + 1e-6 for update in updates)

    def test_draws_follow_seed_and_step(self) -> None:
        steps = gradients(9, 8, steps=2)
        transform = LowRankMoment(rank=2, iterations=0, oversampling=0)

        def factors(seed: int, step: int) -> torch.Tensor:
            state = transform.init(steps[0])
            transform.observe(steps[0], state, Context(step, seeds=(seed,)))
            return state["left"]

        assert torch.equal(factors(1, 1), factors(1, 1))
        assert not torch.allclose(factors(1, 1), factors(2, 1))
        assert not torch.allclose(factors(1, 1), factors(1, 2))

    def test_state_bytes(self) -> None:
        matrix = torch.empty(7, 11, device="meta")
        assert tensor_bytes(LowRankMoment(rank=3).init(matrix)) == 4 * 3 * 18
        assert tensor_bytes(LowRankMoment(rank=30).init(matrix)) == 4 * 7 * 18

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"rank": 0}, "rank=0"),
            ({"beta": 1.0}, "beta=1.0"),
            ({"eps": 0.0}, "eps=0.0"),
            ({"iterations": -1}, "iterations=-1"),
            ({"oversampling": -1}, "oversampling=-1"),
        ],
    )
    def test_bad_settings(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            LowRankMoment(**settings)
