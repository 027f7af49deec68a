"""A recipe's fused step against its transforms, one by one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from neurms.core.optimizers.base import PreconditionedOptimizer
from neurms.core.optimizers.registry import create, optimizer_class

CASES: list[tuple[str, dict[str, Any]]] = [
    ("rmnp", {"weight_decay": 0.1}),
    ("rmnp", {"nesterov": False, "shape_scale": False}),
    ("racs", {"weight_decay": 0.1}),
    ("racs", {"bias_correction": True, "gamma": 1.0}),
]


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize(("name", "settings"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_fused_equals_the_transforms(
    name: str,
    settings: dict[str, Any],
    backend: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trajectories = []
    for fused in (True, False):
        cls = optimizer_class(name)
        if not fused:
            made = cls.recipe
            monkeypatch.setattr(cls, "recipe", lambda s, made=made: replace(made(s), fused=None))
        generator = torch.Generator().manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(300, 256, generator=generator).to(dtype))
        optimizer = create(name, [parameter], backend=backend, lr=0.1, **settings)
        assert isinstance(optimizer, PreconditionedOptimizer)
        for scale in (1.0, 5.0, 0.1):
            gradient = torch.randn(300, 256, generator=generator) * scale
            gradient[3] = 0
            parameter.grad = gradient.to(dtype)
            optimizer.step()
        trajectories.append(parameter.detach().double())
    tolerance = 1e-2 if dtype == torch.bfloat16 else 3e-6
    torch.testing.assert_close(*trajectories, rtol=tolerance, atol=tolerance)
