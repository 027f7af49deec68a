"""The guard notices every change of a gradient between backward and step, and nothing else."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

from neurms.core.ground.errors import UnsupportedTrainingError
from neurms.core.taps.guard import GradientGuard


def guarded() -> tuple[nn.Module, GradientGuard]:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    return model, GradientGuard(model.parameters())


def backward(model: nn.Module) -> None:
    model(torch.ones(2, 3)).square().sum().backward()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: torch.nn.utils.clip_grad_norm_(m.parameters(), 0.1),
        lambda m: torch.nn.utils.clip_grad_norm_(m.parameters(), 1e9),
        lambda m: torch.nn.utils.clip_grad_norm_(m.parameters(), 1e9, foreach=False),
        lambda m: torch.nn.utils.clip_grad_value_(m.parameters(), 0.1),
        lambda m: m[2].bias.grad.add_(1.0),
        lambda m: setattr(m[2].bias, "grad", m[2].bias.grad * 2),
    ],
    ids=["norm", "idle norm", "one by one", "value", "one of four", "replaced"],
)
def test_changes_are_noticed_once(change: Callable[[nn.Module], object]) -> None:
    model, guard = guarded()
    backward(model)
    change(model)
    with pytest.raises(UnsupportedTrainingError, match=r"changed between.*update=\"step\""):
        guard.check()
    guard.check()


@pytest.mark.parametrize(
    "harmless",
    [
        lambda m: None,
        backward,
        lambda m: [p.grad.norm() for p in m.parameters()],
        lambda m: m.zero_grad(),
        lambda m: m.zero_grad(set_to_none=False),
        lambda m: (m.zero_grad(), backward(m)),
        lambda m: (m.zero_grad(set_to_none=False), backward(m)),
        lambda m: (m.zero_grad(), m[0](torch.ones(1, 3)).sum().backward()),
    ],
    ids=["nothing", "more", "reading", "none", "zero", "none, again", "zero, again", "a part"],
)
def test_all_else_is_not(harmless: Callable[[nn.Module], object]) -> None:
    model, guard = guarded()
    for _ in range(2):
        backward(model)
        harmless(model)
        guard.check()


def test_what_is_forgotten_is_not_held_against_anyone() -> None:
    model, guard = guarded()
    backward(model)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    guard.forget()
    guard.check()


def test_detached_it_sees_nothing() -> None:
    model, guard = guarded()
    guard.detach()
    backward(model)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    guard.check()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_it_lives_no_longer_than_its_owner_and_keeps_no_model() -> None:
    model, guard = guarded()
    backward(model)
    gone = weakref.ref(guard)
    del guard
    assert gone() is None
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    model, guard = guarded()
    backward(model)
    alive = weakref.ref(model[0].weight)
    del model
    gc.collect()
    assert alive() is None
    guard.check()


def test_frozen_parameters_need_no_guard() -> None:
    model = nn.Linear(3, 2)
    model.weight.requires_grad_(False)
    guard = GradientGuard(model.parameters())
    backward(model)
    guard.check()
