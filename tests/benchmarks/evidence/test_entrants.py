"""Every method of every contest: what its search has to vary, and what it makes of the values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.contest import TASKS, entrants_of
from benchmarks.evidence.entrants import Entrant
from benchmarks.evidence.rules import searched
from benchmarks.own_rules import TwoRates

CASES = {f"{task}, {name}": e for task in TASKS for name, e in entrants_of(task).items()}


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.LayerNorm(6), nn.Linear(6, 3))


@pytest.mark.parametrize("name", CASES)
def test_the_values_of_a_search_arrive(name: str) -> None:
    entrant = CASES[name]
    values = entrant.space.values(entrant.space.origin)
    optimizer = entrant.make(network(), values)
    asked: dict[str, Any] = {"lr": values["lr"]}
    if entrant.rule.startswith("adamw") or entrant.rule == "block_adam":
        asked["betas"] = (values["momentum"], values["memory"])
    elif entrant.rule == "sketchy":
        asked |= {"betas": (0.0, values["memory"]), "momentum": values["momentum"]}
    else:
        asked |= {"momentum": values["momentum"]} if "momentum" in values else {}
        asked |= {"beta": values["memory"]} if "memory" in values else {}
    groups = optimizer.param_groups
    for setting, value in asked.items():
        assert any(group.get(setting) == value for group in groups), setting
    if "fallback_lr" in values:
        rest = (values["fallback_lr"], (values["fallback_momentum"], entrant.memory))
        two = type(optimizer) is TwoRates
        names = ("lr", "betas") if two else ("fallback_lr", "fallback_betas")
        assert rest in [tuple(group.get(name) for name in names) for group in groups]


@pytest.mark.parametrize("name", CASES)
def test_the_search_varies_what_its_rule_has(name: str) -> None:
    entrant = CASES[name]
    assert searched(entrant.rule, entrant.settings) <= set(entrant.space.axes)
    optimizer = entrant.make(network(), entrant.space.values(entrant.space.origin))
    plan = getattr(optimizer, "plan", list)
    outside = [row for row in plan() if row.rule == "fallback"]
    if outside and "mnist, NeuRMS" not in name:
        assert "fallback_lr" in entrant.space.axes


def test_a_momentum_of_another_rule_is_not_taken_for_adamw_s() -> None:
    entrant: Entrant = entrants_of("text-64")["SGD"]
    values = entrant.space.values(entrant.space.origin) | {"momentum": 0.3}
    optimizer = entrant.make(network(), values)
    assert type(optimizer) is torch.optim.SGD
    assert optimizer.param_groups[0]["momentum"] == 0.3
    assert optimizer.param_groups[0]["fused"]
