"""Variant P's fused step against its structure, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch

from neurms.compiled import use_backend
from neurms.core.optimizers.moments_recipe import moments_recipe
from neurms.core.optimizers.recipe import FusedStep
from neurms.core.structures.base import Context
from neurms.core.structures.gradient_moments import GradientMoments


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_fused_step_equals_the_structure_in_float64(
    momentum: float, by_columns: bool, backend: str
) -> None:
    recipe = moments_recipe(GradientMoments(momentum=momentum))
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(300, 256, generator=generator)
    weight = weight.mT if by_columns else weight
    state, wide = recipe.init(weight), weight.double()
    truth = recipe.init(wide)
    assert recipe.fused is not None
    for step in range(1, 5):
        gradient = torch.randn(300, 256, generator=generator) * torch.logspace(0, -2, 256)
        gradient[3] = 0
        gradient = gradient.mT if by_columns else gradient
        before = gradient.clone()
        with use_backend(backend):
            recipe.fused(FusedStep(weight, gradient, state, Context(step), 0.1, 0.99))
        wide = 0.99 * wide - 0.1 * recipe.update(gradient.double(), truth, Context(step))
        assert torch.equal(gradient, before)
    torch.testing.assert_close(weight.double(), wide, rtol=3e-6, atol=3e-6)
    for key, value in state.items():
        torch.testing.assert_close(value.double(), truth[key], rtol=3e-6, atol=3e-6)
