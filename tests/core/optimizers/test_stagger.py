"""Renewals of different matrices at different steps: SOAP's bases, Shampoo's roots."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

import neurms

INTERVAL = 4
RULES = {
    "soap": ("left_basis", {"interval": INTERVAL}),
    "shampoo": ("left_root", {"interval": INTERVAL, "merge_dims": False, "eps": 1e-3}),
}


def made(rule: str, stagger: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(5, 5, bias=False) for _ in range(12)))
    settings: dict[str, Any] = {**RULES[rule][1], "stagger": stagger, "head": "rule"}
    return model, neurms.create(rule, model, lr=1e-3, **settings)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def renewals(rule: str, stagger: bool, steps: int) -> list[list[int]]:
    """Return of each matrix the steps in which its basis or root became another one."""
    model, optimizer = made(rule, stagger)
    key, found = RULES[rule][0], [[] for _ in model.parameters()]  # type: ignore[var-annotated]
    last: list[Any] = [None] * len(found)
    for number in range(1, steps + 1):
        step(model, optimizer, number)
        for index, parameter in enumerate(model.parameters()):
            now = optimizer.state[parameter][key].clone()
            if last[index] is None or not torch.equal(now, last[index]):
                found[index].append(number)
            last[index] = now
    return found


@pytest.mark.parametrize("rule", RULES)
def test_all_at_once_is_the_default_schedule(rule: str) -> None:
    assert all(steps == [1, 5, 9, 13] for steps in renewals(rule, False, 13))


@pytest.mark.parametrize("rule", RULES)
def test_each_has_a_turn_of_its_own_in_every_interval(rule: str) -> None:
    found = renewals(rule, True, 13)
    for steps in found:
        assert steps[0] == 1
        assert {b - a for a, b in pairwise(steps[1:])} == {INTERVAL}
        assert steps[1] - 1 <= INTERVAL
    assert len({steps[1] for steps in found}) > 1


@pytest.mark.parametrize("rule", RULES)
def test_a_resumed_run_keeps_the_turns(rule: str) -> None:
    model, optimizer = made(rule, True)
    for number in range(1, 4):
        step(model, optimizer, number)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    again, resumed = made(rule, True)
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for number in range(4, 10):
        step(model, optimizer, number)
        step(again, resumed, number)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("rule", RULES)
def test_another_value_is_refused(rule: str) -> None:
    with pytest.raises(TypeError, match="stagger='yes' must be True or False"):
        neurms.create(rule, [nn.Parameter(torch.zeros(2, 2))], stagger="yes")
