"""RACS without its average: every step's own fit."""

from __future__ import annotations

import pytest
import torch

from neurms import RACS
from neurms.testing import gradients


@pytest.mark.parametrize(("shape", "dtype"), [((6, 4), torch.float64), ((256, 200), torch.float32)])
def test_without_average_it_is_each_steps_own_fit(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
    truth, phi = torch.zeros(shape, dtype=torch.float64), 0.0
    optimizer = RACS([weight], lr=0.1, beta=0.0, alpha=0.5)
    for number, gradient in enumerate(gradients(*shape, steps=6, dtype=dtype)):
        weight.grad = gradient.clone()
        optimizer.step()
        squares = gradient.double().square()
        q = torch.ones(shape[0], dtype=torch.float64)
        for _ in range(5):
            s = squares.mT @ q / q.square().sum()
            q = squares @ s / s.square().sum()
        scaled = gradient.double() / (q[:, None] * s).sqrt()
        norm = float(scaled.norm())
        eta = 1.01 / max(norm / phi, 1.01) if number else 1.0
        phi = eta * norm
        truth -= 0.1 * 0.5 * eta * scaled
        tolerance = 1e-9 if dtype == torch.float64 else 1e-4
        torch.testing.assert_close(weight.detach().double(), truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("alpha", [-0.1, float("inf"), float("-inf")])
def test_a_factor_that_makes_no_descent_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"alpha=.* must be finite and at least 0"):
        RACS([torch.nn.Parameter(torch.ones(2, 2))], alpha=alpha)
