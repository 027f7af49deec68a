"""SOAP's structure against a dense Kronecker basis and a float64 transcription of its algorithm."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from neurms.core.optimizers.plan import tensor_bytes
from neurms.core.structures.base import Context
from neurms.core.structures.two_sided_eigen import TwoSidedEigen
from neurms.testing import TransformContract, gradients, run

GOLDEN = Path(__file__).parents[2] / "golden"


def eigenvectors(matrix: Tensor) -> Tensor:
    return torch.linalg.eigh(matrix)[1].flip(1)


class TestTwoSidedEigen(TransformContract):
    transform = TwoSidedEigen(interval=1, eps=0.0)
    tolerance = 1e-6

    # A null space has no basis of its own: where the first gradient leaves one, updates depend on
    # the routine's choice, and permuting the gradients changes that choice.
    permutes_units = False
    permutes_features = False

    def test_scale_invariance(self, steps: Tensor) -> None:
        # A power of two keeps every bit, and with them the choice of a null space's basis.
        plain, _ = run(self.transform, steps)
        scaled, _ = run(self.transform, steps * 2.0**13)
        for a, b in zip(plain, scaled, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)

    def test_permutations_of_square_gradients(self) -> None:
        steps = gradients(5, 5, steps=4)
        units = torch.tensor([3, 1, 0, 4, 2])
        plain, _ = run(self.transform, steps)
        rows, _ = run(self.transform, steps[:, units])
        columns, _ = run(self.transform, steps[..., units])
        for a, b, c in zip(plain, rows, columns, strict=True):
            torch.testing.assert_close(a[units], b, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(a[:, units], c, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("interval", [1, 3])
    def test_equals_a_transcription_with_momentum_in_the_full_space(self, interval: int) -> None:
        steps = gradients(4, 4, steps=9)
        updates, _ = run(TwoSidedEigen((0.8, 0.9), 0.7, 1e-6, interval), steps)
        left = 0.3 * steps[0] @ steps[0].mT
        right = 0.3 * steps[0].mT @ steps[0]
        ql, qr = eigenvectors(left), eigenvectors(right)
        mean = v = torch.zeros(4, 4, dtype=torch.float64)
        assert updates[0].count_nonzero() == 0
        for count, gradient in enumerate(steps[1:], 1):
            mean = 0.8 * mean + 0.2 * gradient
            v = 0.9 * v + 0.1 * (ql.mT @ gradient @ qr) ** 2
            size = (1 - 0.9**count) ** 0.5 / (1 - 0.8**count)
            expected = ql @ (ql.mT @ mean @ qr / (v.sqrt() + 1e-6)) @ qr.mT * size
            torch.testing.assert_close(updates[count], expected, rtol=1e-8, atol=1e-9)
            left = 0.7 * left + 0.3 * gradient @ gradient.mT
            right = 0.7 * right + 0.3 * gradient.mT @ gradient
            if count % interval == 0:
                order = torch.diag(ql.mT @ left @ ql).argsort(descending=True)
                ql, v = torch.linalg.qr(left @ ql[:, order])[0], v[order]
                order = torch.diag(qr.mT @ right @ qr).argsort(descending=True)
                qr, v = torch.linalg.qr(right @ qr[:, order])[0], v[:, order]

    @pytest.mark.parametrize("shape", [(3, 4), (4, 3)])
    def test_equals_the_dense_kronecker_basis(self, shape: tuple[int, int]) -> None:
        structure = TwoSidedEigen(eps=1e-3)
        _, state = run(structure, gradients(*shape, steps=4))
        gradient = gradients(*shape, steps=1, seed=3)[0]
        basis = torch.kron(state["right_basis"], state["left_basis"])
        root = state["exp_avg_sq"].mT.reshape(-1).sqrt() + 1e-3
        dense = basis @ torch.diag(1 / root) @ basis.mT @ gradient.mT.reshape(-1)
        expected = dense.reshape(*reversed(shape)).mT
        torch.testing.assert_close(structure.precondition(gradient, state, Context(5)), expected)

    @pytest.mark.parametrize("shape", ["16x8", "4x6", "6x4", "8x16"])
    def test_first_update_of_the_authors_where_their_basis_is_determined(self, shape: str) -> None:
        # After one gradient the longer side's factor is singular, and LAPACK's basis of its null
        # space differs from machine to machine: the reference is checked in the range of G_1 only.
        data = np.load(GOLDEN / "soap.npz")
        first, second = (torch.from_numpy(data[f"{shape}/gradients"][i]).double() for i in (0, 1))
        before, after = (torch.from_numpy(data[f"{shape}/parameters"][i]).double() for i in (0, 1))
        expected = (before - after / (1 - 0.003 * 0.01)) / 0.003
        update = run(TwoSidedEigen((0.95, 0.95), interval=3), torch.stack([first, second]))[0][1]
        left, _, right = torch.linalg.svd(first, full_matrices=False)
        seen = left.mT @ update @ right.mT
        torch.testing.assert_close(seen, left.mT @ expected @ right.mT, rtol=0, atol=2e-3)
        torch.testing.assert_close(seen.abs(), torch.ones_like(seen), rtol=0, atol=1e-3)

    def test_orthogonal_invariance(self) -> None:
        steps = gradients(4, 4, steps=6)
        turn = torch.linalg.qr(gradients(4, 4, steps=1, seed=8)[0])[0]
        structure = TwoSidedEigen(interval=2)
        plain, _ = run(structure, steps)
        turned, _ = run(structure, turn @ steps)
        for a, b in zip(plain, turned, strict=True):
            torch.testing.assert_close(turn @ a, b, rtol=1e-6, atol=1e-7)

    def test_long_sides_keep_the_identity(self) -> None:
        steps = gradients(4, 6, steps=4)
        one_sided = TwoSidedEigen(max_preconditioned_dim=4)
        _, state = run(one_sided, steps)
        assert {key for key in state if key.startswith("right")} == set()
        assert state["left_basis"].shape == (4, 4)
        none = TwoSidedEigen((0.9, 0.99), max_preconditioned_dim=2)
        parameter = torch.nn.Parameter(torch.zeros(4, 6, dtype=torch.float64))
        adam = torch.optim.Adam([parameter], lr=1.0, betas=(0.9, 0.99), eps=0.0)
        position = torch.zeros(4, 6, dtype=torch.float64)
        for gradient, update in zip(steps[1:], run(none, steps)[0][1:], strict=True):
            parameter.grad = gradient.clone()
            adam.step()
            position -= update
            torch.testing.assert_close(parameter.detach(), position, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_dead_units_and_features_never_move(self, dtype: torch.dtype) -> None:
        steps = gradients(8, 40, steps=25).to(dtype)
        steps[:, 2], steps[:, :, :5] = 0, 0
        updates, _ = run(TwoSidedEigen(interval=5), steps)
        for update in updates:
            assert update.isfinite().all()
            assert update[2].count_nonzero() == 0
            assert update[:, :5].count_nonzero() == 0

    def test_state_bytes(self) -> None:
        m, n = 6, 4
        meta = torch.empty(m, n, device="meta")
        both = 4 * (2 * m * n + 2 * m * m + 2 * n * n)
        assert tensor_bytes(TwoSidedEigen().init(meta)) == both
        one = TwoSidedEigen(max_preconditioned_dim=5).init(meta)
        assert tensor_bytes(one) == 4 * (2 * m * n + 2 * n * n)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"betas": (1.0, 0.9)}, r"betas\[0\]=1.0"),
            ({"shampoo_beta": 1.5}, "shampoo_beta=1.5"),
            ({"interval": 0}, "interval=0"),
            ({"eps": -1e-8}, "eps"),
            ({"max_preconditioned_dim": 0}, "max_preconditioned_dim=0"),
        ],
    )
    def test_bad_settings(self, settings: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            TwoSidedEigen(**settings)  # type: ignore[arg-type]
