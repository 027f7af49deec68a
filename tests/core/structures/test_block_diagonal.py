"""Blocks of features: against Adam, and against the dense block-diagonal matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from neurms.core.optimizers.plan import tensor_bytes
from neurms.core.structures.base import Context
from neurms.core.structures.block_diagonal import BlockDiagonal, block_width
from neurms.testing import TransformContract, gradients, run


class TestBlockDiagonal(TransformContract):
    transform = BlockDiagonal(beta=0.9, block_size=3)
    scale_invariant = True
    permutes_features = False

    def test_equals_the_dense_structure(self) -> None:
        steps = gradients(3, 6, steps=5)
        updates, _ = run(BlockDiagonal(beta=0.8, eps=1e-3, block_size=2), steps)
        fisher = torch.zeros(18, 18, dtype=torch.float64)
        for gradient in steps:
            g = gradient.reshape(-1)
            fisher = 0.8 * fisher + 0.2 * torch.outer(g, g)
        mask = torch.block_diag(*torch.ones(9, 2, 2, dtype=torch.float64))
        fisher = fisher * mask / (1 - 0.8**5)
        values, vectors = torch.linalg.eigh(fisher)
        root = (vectors / (values.clamp(min=0).sqrt() + 1e-3)) @ vectors.T
        expected = (root @ steps[-1].reshape(-1)).reshape(3, 6)
        torch.testing.assert_close(updates[-1], expected, rtol=1e-8, atol=1e-9)

    def test_whole_rows_are_per_unit_full_matrix_roots(self) -> None:
        steps = gradients(3, 4, steps=9)
        updates, _ = run(BlockDiagonal(beta=0.9, eps=1e-6, block_size=4), steps)
        weights = 0.9 ** torch.arange(8, -1, -1, dtype=torch.float64)
        weights = weights / weights.sum()
        for i in range(3):
            moment = torch.einsum("t,ta,tb->ab", weights, steps[:, i], steps[:, i])
            values, vectors = torch.linalg.eigh(moment)
            expected = vectors @ ((vectors.T @ steps[-1, i]) / (values.sqrt() + 1e-6))
            torch.testing.assert_close(updates[-1][i], expected, rtol=1e-7, atol=1e-9)

    def test_roots_are_kept_for_the_interval(self) -> None:
        steps = gradients(3, 4, steps=10)
        steps[7:9] *= 0.5  # well within what the roots of step 7 have seen
        every, _ = run(BlockDiagonal(beta=0.9, block_size=2), steps)
        transform = BlockDiagonal(beta=0.9, block_size=2, interval=3)
        lazy, state = run(transform, steps[:7])
        torch.testing.assert_close(lazy[0], every[0])
        torch.testing.assert_close(lazy[6], every[6])
        root = state["root"].clone()
        for number in (8, 9):
            transform.observe(steps[number - 1], state, Context(number))
            assert torch.equal(state["root"], root)
        torch.testing.assert_close(transform(steps[9], state, Context(10)), every[9])
        assert not torch.allclose(state["root"], root)

    def test_an_old_root_does_not_blow_up_what_it_never_saw(self) -> None:
        steps = torch.zeros(9, 2, 4, dtype=torch.float32)
        steps[..., 0] = 1e-3
        steps[5:, 0] = torch.tensor([0.0, 1e-3, 0.0, 0.0])  # unit 0 turns after step 5
        lazy, _ = run(BlockDiagonal(beta=0.9, block_size=4, interval=100), steps)
        every, _ = run(BlockDiagonal(beta=0.9, block_size=4), steps)
        torch.testing.assert_close(lazy[5][0], every[5][0])
        assert max(float(update.abs().max()) for update in lazy) <= 10**0.5
        torch.testing.assert_close(lazy[8][1], every[8][1])

    @pytest.mark.parametrize(
        ("features", "size", "width"),
        [(12, 8, 6), (16, 8, 8), (7, 8, 7), (11, 8, 1), (3, 8, 3), (9, 1, 1), (1, 4, 1)],
    )
    def test_block_width_is_the_largest_divisor(self, features: int, size: int, width: int) -> None:
        assert block_width(features, size) == width

    def test_state_bytes(self) -> None:
        matrix = torch.empty(5, 12, device="meta")
        assert tensor_bytes(BlockDiagonal(block_size=4).init(matrix)) == 4 * 60 * 4
        assert tensor_bytes(BlockDiagonal(block_size=4, interval=2).init(matrix)) == 4 * 60 * 8
        assert tensor_bytes(BlockDiagonal(block_size=1, interval=2).init(matrix)) == 4 * 60

    @pytest.mark.parametrize("scale", [1e-12, 1e12])
    def test_rounding_is_not_blown_up_in_singular_blocks(self, scale: float) -> None:
        steps = gradients(6, 8, steps=3, dtype=torch.float32)
        transform = BlockDiagonal(eps=1e-30, block_size=8)
        truth, _ = run(transform, steps.double())
        updates, _ = run(transform, steps * scale)
        for ours, expected in zip(updates, truth, strict=True):
            torch.testing.assert_close(ours.double(), expected, rtol=0.02, atol=0.02)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"beta": 1.0}, "beta=1.0"),
            ({"eps": 0.0}, "eps=0.0"),
            ({"block_size": 0}, "block_size=0"),
            ({"interval": 0}, "interval=0"),
        ],
    )
    def test_bad_settings(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            BlockDiagonal(**settings)
