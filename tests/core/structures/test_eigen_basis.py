"""Diag_B(U D_i U^T) against dense float64 block-diagonal matrices."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from neurms.core.optimizers.plan import tensor_bytes
from neurms.core.structures.base import Context
from neurms.core.structures.eigen_basis import EigenBasis, due
from neurms.testing import TransformContract, gradients, run


def vec(matrix: Tensor) -> Tensor:
    """Stack the columns."""
    return matrix.mT.reshape(-1)


class TestEigenBasis(TransformContract):
    transform = EigenBasis(interval=1, eps=0.0)
    scale_invariant = True
    tolerance = 1e-7

    @pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
    def test_equals_the_dense_block_diagonal_structure(self, shape: tuple[int, int]) -> None:
        steps = gradients(*shape, steps=6)
        structure = EigenBasis(betas=(0.0, 0.9, 0.8), interval=2, eps=1e-3)
        updates, state = run(structure, steps)
        q = torch.zeros(shape[0], shape[0], dtype=torch.float64)
        v = torch.zeros(shape, dtype=torch.float64)
        u = q
        for number, gradient in enumerate(steps, 1):
            q = 0.8 * q + 0.2 * gradient @ gradient.mT
            if number == 1 or number % 2 == 0:
                u = torch.linalg.eigh(q)[1].flip(1)
            v = 0.9 * v + 0.1 * (u.mT @ gradient) ** 2
        roots = [u @ torch.diag(1 / (column.sqrt() + 1e-3)) @ u.mT for column in v.mT]
        dense = torch.block_diag(*roots)
        torch.testing.assert_close(vec(updates[-1]), dense @ vec(steps[-1]), rtol=1e-8, atol=1e-10)
        other = gradients(*shape, steps=1, seed=3)[0]
        torch.testing.assert_close(
            vec(structure.precondition(other, state, Context(6))), dense @ vec(other)
        )

    def test_momentum_lives_in_the_full_space(self) -> None:
        steps = gradients(3, 5, steps=5)
        with_momentum, state = run(EigenBasis(interval=2), steps)
        mean = torch.zeros(3, 5, dtype=torch.float64)
        for gradient in steps:
            mean = 0.9 * mean + 0.1 * gradient
        torch.testing.assert_close(state["exp_avg"], mean)
        expected = EigenBasis(interval=2).precondition(mean, state, Context(5))
        torch.testing.assert_close(with_momentum[-1], expected)

    def test_diagonal_gram_makes_it_adam(self) -> None:
        # Rows that stay orthogonal keep the axes as eigenvectors.
        rows = torch.tensor([[4.0, 4.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
        structure = EigenBasis(betas=(0.0, 0.0, 0.9), eps=0.0)
        updates, _ = run(structure, torch.stack([rows, -2 * rows]))
        torch.testing.assert_close(updates[-1], -rows.sign())

    def test_interval_keeps_the_basis_in_between(self) -> None:
        structure = EigenBasis(interval=3)
        state = structure.init(torch.zeros(3, 4, dtype=torch.float64))
        bases = []
        for number, gradient in enumerate(gradients(3, 4, steps=6), 1):
            structure(gradient, state, Context(number))
            bases.append(state["basis"].clone())
        changed = [not torch.equal(a, b) for a, b in pairwise(bases)]
        assert changed == [False, True, False, False, True]
        assert [due(step, 3) for step in range(1, 7)] == [True, False, True, False, False, True]

    def test_transpose_tall_works_on_the_shorter_side(self) -> None:
        steps = gradients(6, 3, steps=3)
        flat, _ = run(EigenBasis(interval=1), steps.mT)
        tall, state = run(EigenBasis(interval=1, transpose_tall=True), steps)
        assert state["basis"].shape == (3, 3)
        for a, b in zip(flat, tall, strict=True):
            torch.testing.assert_close(a.mT, b)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_low_rank_gradients_move_nothing_outside_their_range(self, dtype: torch.dtype) -> None:
        left = gradients(8, 2, steps=1)[0]
        steps = (left @ gradients(2, 9, steps=12, seed=1)).to(dtype)
        updates, _ = run(EigenBasis(interval=3, eps=0.0), steps)
        q = torch.linalg.qr(left)[0].to(dtype)
        for update in updates:
            outside = update - q @ (q.mT @ update)
            assert outside.norm() <= 1e-4 * update.norm()

    def test_dead_unit_does_not_move_when_the_others_come_alive(self) -> None:
        steps = gradients(6, 2, steps=5).float()
        steps[:, 4] = 0
        updates, _ = run(EigenBasis(interval=10), steps)
        assert all(update[4].count_nonzero() == 0 for update in updates)

    def test_state_bytes(self) -> None:
        m, n = 6, 4
        meta = torch.empty(m, n, device="meta")
        assert tensor_bytes(EigenBasis().init(meta)) == 4 * (2 * m * n + 2 * m * m)
        no_momentum = EigenBasis(betas=(0.0, 0.9, 0.9), transpose_tall=True)
        assert tensor_bytes(no_momentum.init(meta)) == 4 * (m * n + 2 * n * n)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"betas": (0.9, 0.9, 1.0)}, r"betas\[2\]=1.0"),
            ({"betas": (0.9, 0.9)}, "must hold 3"),
            ({"interval": 0}, "interval=0"),
            ({"eps": -1.0}, "eps=-1.0"),
        ],
    )
    def test_bad_settings(self, settings: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            EigenBasis(**settings)  # type: ignore[arg-type]
