"""The correction as a factor, against torch's Adam."""

from __future__ import annotations

import pytest
import torch

from neurms.core.structures.projected_diagonal import ProjectedDiagonal
from neurms.core.transforms.bias_correction import BiasCorrection
from neurms.testing import TransformContract, gradients, run


class TestBiasCorrection(TransformContract):
    transform = BiasCorrection()

    def test_makes_adam_of_the_uncorrected_moments(self) -> None:
        steps = gradients(3, 4, steps=5)
        parameter = torch.nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
        adam = torch.optim.Adam([parameter], lr=1.0, eps=0.0)
        raw, _ = run(ProjectedDiagonal((0.9, 0.999)), steps)
        corrected, _ = run(self.transform, torch.stack(raw))
        expected = torch.zeros(3, 4, dtype=torch.float64)
        for gradient, update in zip(steps, corrected, strict=True):
            parameter.grad = gradient.clone()
            adam.step()
            expected -= update
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-9, atol=1e-9)

    def test_bad_settings(self) -> None:
        with pytest.raises(ValueError, match=r"betas\[1\]=1.0"):
            BiasCorrection((0.9, 1.0))
