"""A recipe's fused step against its transforms, one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from neurms.core.optimizers.base import PreconditionedOptimizer
from neurms.core.optimizers.recipe import FusedStep, Recipe
from neurms.core.optimizers.registry import create, optimizer_class

CASES: list[tuple[str, dict[str, Any]]] = [
    ("rmnp", {"weight_decay": 0.1}),
    ("rmnp", {"nesterov": False, "shape_scale": False}),
    ("racs", {"weight_decay": 0.1}),
    ("racs", {"bias_correction": True, "gamma": 1.0}),
    ("racs", {"fit": "tracked", "weight_decay": 0.1}),
    ("racs", {"fit": "sums", "bias_correction": True}),
    ("racs", {"fit": "sums"}),
]


def unfused(made: Callable[[Mapping[str, Any]], Recipe]) -> Callable[[Mapping[str, Any]], Recipe]:
    return lambda settings: replace(made(settings), fused=None, judged=None)


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
    trajectories, calls = [], 0
    cls = optimizer_class(name)
    made = cls.recipe

    def counted(settings: Mapping[str, Any]) -> Recipe:
        recipe = made(settings)
        assert recipe.fused is not None

        def fused(steps: Sequence[FusedStep]) -> None:
            nonlocal calls
            calls += 1
            recipe.fused(steps)  # type: ignore[misc]

        return replace(recipe, fused=fused, judged=None)

    for recipe_of in (counted, unfused(made)):
        monkeypatch.setattr(cls, "recipe", recipe_of)
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
    assert calls == 3, "the fused step is what the first trajectory must have taken"
    tolerance = 1e-2 if dtype == torch.bfloat16 else 3e-6
    torch.testing.assert_close(*trajectories, rtol=tolerance, atol=tolerance)


SIZES = [(64, 64)] * 8 + [(24, 100), (3, 5), (1, 7)]


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_many_small_matrices_take_one_call(
    name: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trajectories, counts = [], []
    cls = optimizer_class(name)
    made = cls.recipe

    def counted(settings: Mapping[str, Any]) -> Recipe:
        recipe = made(settings)

        def fused(steps: Sequence[FusedStep]) -> None:
            counts.append(len(steps))
            recipe.fused(steps)  # type: ignore[misc]

        def judged(steps: Sequence[FusedStep]) -> bool:
            counts.append(len(steps))
            return recipe.judged(steps)  # type: ignore[misc]

        return replace(recipe, fused=fused, judged=recipe.judged and judged)

    for recipe_of in (counted, unfused(made)):
        monkeypatch.setattr(cls, "recipe", recipe_of)
        generator = torch.Generator().manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in SIZES]
        optimizer = create(name, parameters, lr=0.1, **settings)
        for scale in (1.0, 5.0, 0.1):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator) * scale
            optimizer.step()
        trajectories.append([parameter.detach().double() for parameter in parameters])
    assert counts == [len(SIZES)] * 3
    torch.testing.assert_close(*trajectories, rtol=3e-6, atol=3e-6)


def test_momentum_follows_a_weight_that_is_stored_by_columns() -> None:
    weights = [
        torch.nn.Parameter(torch.ones(300, 256)),
        torch.nn.Parameter(torch.ones(256, 300).t()),
    ]
    weights[1].data = torch.ones(256, 300).t()
    for weight in weights:
        generator = torch.Generator().manual_seed(0)
        optimizer = create("rmnp", [weight], lr=0.1)
        for _ in range(3):
            gradient = torch.randn(300, 256, generator=generator)
            weight.grad = gradient.t().contiguous().t() if weight is weights[1] else gradient
            optimizer.step()
        velocity = optimizer.state[weight]["momentum"]
        assert velocity.stride() == weight.stride()
    torch.testing.assert_close(weights[0].data, weights[1].data, rtol=1e-6, atol=1e-6)


def test_hooks_and_the_profiler_are_told_of_a_step_once() -> None:
    weight = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = create("rmnp", [weight], lr=0.1)
    weight.grad = torch.ones(3, 2)
    told = []
    before = optimizer.register_step_pre_hook(lambda *call: told.append("before"))
    after = optimizer.register_step_post_hook(lambda *call: told.append("after"))
    optimizer.step()
    before.remove()
    after.remove()
    optimizer.step()
    assert told == ["before", "after"]
    with torch.profiler.profile() as profile:
        optimizer.step()
    names = [event.key for event in profile.key_averages()]
    assert names.count("Optimizer.step#RMNP.step") == 1
