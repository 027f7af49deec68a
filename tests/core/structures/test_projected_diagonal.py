"""Diag(v) in given coordinates: the noise guard, and rotation of its moments."""

from __future__ import annotations

import pytest
import torch

from neurms.core.optimizers.plan import tensor_bytes
from neurms.core.structures.base import Context
from neurms.core.structures.projected_diagonal import ProjectedDiagonal
from neurms.testing import TransformContract, gradients, run


class TestProjectedDiagonal(TransformContract):
    transform = ProjectedDiagonal()
    scale_invariant = True

    def test_equals_the_definition(self) -> None:
        steps = gradients(3, 4, steps=4)
        updates, _ = run(self.transform, steps)
        m = v = torch.zeros(3, 4, dtype=torch.float64)
        for gradient, update in zip(steps, updates, strict=True):
            m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            torch.testing.assert_close(update, m / v.sqrt())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_rounding_noise_is_not_amplified(self, dtype: torch.dtype) -> None:
        z = torch.tensor([[1.0, 1.0], [torch.finfo(dtype).eps, 1e-4]], dtype=dtype)
        update = self.transform(z, self.transform.init(z), Context(1))
        assert update[1, 0] == 0
        assert update[1, 1] == pytest.approx(update[0, 0].item(), rel=1e-4)

    def test_column_energy_is_the_corrected_average(self) -> None:
        gradient = gradients(3, 4, steps=1)[0]
        state = self.transform.init(gradient)
        for step in range(1, 4):
            self.transform(gradient, state, Context(step))
            energy = self.transform.column_energy(state, Context(step))
            torch.testing.assert_close(energy, gradient.square().sum(0))

    def test_rotation_carries_the_moments_over(self) -> None:
        steps = gradients(3, 4, steps=3)
        rotation = torch.linalg.qr(gradients(3, 3, steps=1, seed=5)[0])[0]
        permutation = torch.eye(3, dtype=torch.float64)[[2, 0, 1]]
        _, state = run(self.transform, steps)
        before = {key: value.clone() for key, value in state.items()}
        self.transform.rotate_(state, rotation)
        torch.testing.assert_close(state["exp_avg"], rotation @ before["exp_avg"])
        torch.testing.assert_close(state["exp_avg_sq"].sum(0), before["exp_avg_sq"].sum(0))
        self.transform.rotate_(before, permutation)
        _, permuted = run(self.transform, steps[:, [2, 0, 1]])
        torch.testing.assert_close(before, permuted)

    def test_state_bytes(self) -> None:
        meta = torch.empty(3, 5, device="meta")
        assert tensor_bytes(self.transform.init(meta)) == 4 * 2 * 15
        assert tensor_bytes(ProjectedDiagonal((0.0, 0.9)).init(meta)) == 4 * 15
