"""Averaging, tiling, flattening and transposing change what a structure sees and nothing else."""

from __future__ import annotations

import pytest
import torch

from neurms.core.structures.adapters import Averaged, Flattened, Tiled, Transposed
from neurms.core.structures.block_diagonal import BlockDiagonal
from neurms.core.structures.diagonal import Diagonal
from neurms.core.structures.kronecker import Kronecker
from neurms.core.structures.two_sided import TwoSidedDiagonal
from neurms.testing import TransformContract, gradients, run


class TestAveraged(TransformContract):
    transform = Averaged(Diagonal((0.0, 0.99), eps=0.0), beta=0.9)
    scale_invariant = True

    def test_is_adam_on_a_diagonal(self) -> None:
        steps = gradients(4, 3, steps=6)
        adam = torch.nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))
        optimizer = torch.optim.Adam([adam], lr=1.0, betas=(0.8, 0.95), eps=1e-8)
        updates, _ = run(Averaged(Diagonal((0.0, 0.95), eps=1e-8), beta=0.8), steps)
        for gradient, update in zip(steps, updates, strict=True):
            adam.data.zero_()
            adam.grad = gradient
            optimizer.step()
            torch.testing.assert_close(-adam.detach(), update)

    def test_without_beta_it_is_the_structure(self) -> None:
        steps = gradients(4, 3, steps=3)
        plain, state = run(Kronecker(), steps)
        averaged, same = run(Averaged(Kronecker(), beta=0.0), steps)
        assert state.keys() == same.keys()
        assert all(torch.equal(a, b) for a, b in zip(plain, averaged, strict=True))

    def test_bad_beta(self) -> None:
        with pytest.raises(ValueError, match=r"beta=1\.0"):
            Averaged(Kronecker(), beta=1.0)


class TestTiled(TransformContract):
    transform = Tiled(Kronecker(eps=1e-3), block_size=3)
    permutes_units = False
    permutes_features = False

    def test_each_tile_is_a_matrix_of_its_own(self) -> None:
        steps = gradients(7, 5, steps=4)
        updates, state = run(Tiled(Kronecker(), block_size=3), steps)
        for rows in (slice(0, 3), slice(3, 6), slice(6, 7)):
            for columns in (slice(0, 3), slice(3, 5)):
                alone, _ = run(Kronecker(), steps[:, rows, columns])
                for whole, tile in zip(updates, alone, strict=True):
                    torch.testing.assert_close(whole[rows, columns], tile)
        sizes = sum(value.numel() for value in state.values())
        assert sizes == 2 * (9 + 9 + 9 + 4) + (9 + 4)  # a single row has no left factor

    def test_small_matrices_are_not_cut(self) -> None:
        steps = gradients(3, 3, steps=3)
        plain, state = run(Kronecker(), steps)
        tiled, same = run(Tiled(Kronecker(), block_size=3), steps)
        assert state.keys() == same.keys()
        assert all(torch.equal(a, b) for a, b in zip(plain, tiled, strict=True))

    def test_bad_block_size(self) -> None:
        with pytest.raises(ValueError, match="block_size=0"):
            Tiled(Kronecker(), block_size=0)


class TestFlattened(TransformContract):
    transform = Flattened(Kronecker(eps=0.1), limit=30)
    tolerance = 1e-8

    def test_small_matrices_become_one_row(self) -> None:
        steps = gradients(4, 3, steps=4)
        flat, _ = run(Flattened(Kronecker(), limit=12), steps)
        row, _ = run(Kronecker(), steps.reshape(4, 1, 12))
        for a, b in zip(flat, row, strict=True):
            torch.testing.assert_close(a.reshape(1, 12), b)

    def test_larger_ones_stay_matrices(self) -> None:
        steps = gradients(4, 3, steps=3)
        flat, _ = run(Flattened(TwoSidedDiagonal(), limit=11), steps)
        plain, _ = run(TwoSidedDiagonal(), steps)
        assert all(torch.equal(a, b) for a, b in zip(plain, flat, strict=True))


class TestTransposed(TransformContract):
    transform = Transposed(BlockDiagonal(beta=0.9, eps=1e-6, block_size=16))
    tolerance = 1e-6

    @pytest.mark.parametrize("shape", [(4, 3), (3, 5)])
    def test_is_the_general_block_diagonal_of_features(self, shape: tuple[int, int]) -> None:
        m, n = shape
        steps = gradients(m, n, steps=6)
        updates, state = run(Transposed(BlockDiagonal(0.8, 1e-3, block_size=m)), steps)
        assert sum(value.numel() for value in state.values()) == m * m * n
        moments = torch.zeros(n, m, m, dtype=steps.dtype)
        for number, (gradient, update) in enumerate(zip(steps, updates, strict=True), 1):
            columns = gradient.T
            moments = 0.8 * moments + 0.2 * columns[:, :, None] * columns[:, None, :]
            fisher = torch.block_diag(*(moments / (1 - 0.8**number)))
            values, vectors = torch.linalg.eigh(fisher)
            inverse = 1 / (values.clamp(min=0.0).sqrt() + 1e-3)
            dense = vectors @ (inverse * (vectors.mT @ columns.flatten()))
            torch.testing.assert_close(update.T.flatten(), dense, rtol=1e-5, atol=1e-6)
