"""Draws go by a seed that belongs to the state, not to the name that a parameter has today."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import neurms

DRAWING = {
    "alice": {"rank": 6, "leading": 2, "interval": 2, "switching": "gaussian"},
    "apollo": {"rank": 3, "interval": 2},
    "low_rank_soap": {"rank": 6, "leading": 2, "interval": 2},
    "adapprox": {},
}


def model_of(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 8), nn.Linear(8, 2))


def train(model: nn.Module, optimizer: Any, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(16, 9, generator=generator)).square().mean().backward()
        optimizer.step()


def made(rule: str, model: nn.Module, named: bool) -> Any:
    params = [p for n, p in model.named_parameters()]
    pairs = [(f"wrapped.{n}", p) for n, p in model.named_parameters()]
    return neurms.create(rule, pairs if named else params, **DRAWING[rule])


@pytest.mark.parametrize("rule", DRAWING)
@pytest.mark.parametrize("named", [True, False])
def test_a_run_goes_on_alike_under_other_names(rule: str, named: bool) -> None:
    whole = model_of()
    optimizer = made(rule, whole, named)
    train(whole, optimizer, 3)
    resumed = copy.deepcopy(whole)
    other = made(rule, resumed, not named)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(whole, optimizer, 4, start=3)
    train(resumed, other, 4, start=3)
    pairs = zip(resumed.parameters(), whole.parameters(), strict=True)
    for mine, truth in pairs:
        torch.testing.assert_close(mine, truth, rtol=0, atol=0)


@pytest.mark.parametrize("rule", DRAWING)
def test_checkpoints_without_seeds_go_on_by_names(rule: str) -> None:
    whole = model_of()
    optimizer = made(rule, whole, named=True)
    train(whole, optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    assert any(state.pop("seed", None) is not None for state in saved["state"].values())
    for state in saved["state"].values():
        state.pop("seed", None)
    resumed = copy.deepcopy(whole)
    other = made(rule, resumed, named=True)
    other.load_state_dict(saved)
    train(whole, optimizer, 4, start=3)
    train(resumed, other, 4, start=3)
    for mine, truth in zip(resumed.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine, truth, rtol=0, atol=0)


def test_stochastic_rounding_draws_alike_under_other_names() -> None:
    def optimizer_of(model: nn.Module, prefix: str) -> Any:
        pairs = [(f"{prefix}.{n}", p) for n, p in model.named_parameters()]
        return neurms.RMNP(pairs, low_precision="stochastic", lr=1e-2)

    def move(model: nn.Module, optimizer: Any) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    model = model_of().bfloat16()
    optimizer = optimizer_of(model, "a")
    move(model, optimizer)
    twin = copy.deepcopy(model)
    other = optimizer_of(twin, "b")
    state = copy.deepcopy(optimizer.state_dict()["state"])
    other.load_state_dict({**other.state_dict(), "state": state})
    move(model, optimizer)
    move(twin, other)
    for mine, truth in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, truth, rtol=0, atol=0)


@pytest.mark.parametrize("settings", [{"normalize": "rms"}, {"variant": "P"}])
def test_probes_of_a_backward_that_moves_weights(settings: dict[str, Any]) -> None:
    whole = model_of()
    optimizer = neurms.NeuRMS(whole, update="backward", lr=1e-3, **{"variant": "U", **settings})
    train(whole, optimizer, 3)
    resumed = copy.deepcopy(whole)
    holder = nn.ModuleDict({"wrapped": resumed})
    other = neurms.NeuRMS(holder, update="backward", lr=1e-3, **{"variant": "U", **settings})
    state = copy.deepcopy(optimizer.state_dict()["state"])
    other.load_state_dict({**other.state_dict(), "state": state})
    train(whole, optimizer, 4, start=3)
    train(resumed, other, 4, start=3)
    for mine, truth in zip(resumed.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine, truth, rtol=0, atol=0)


@pytest.mark.parametrize("rule", ["rmnp", "soap", "muon"])
def test_rules_that_draw_nothing_keep_no_seed(rule: str) -> None:
    model = model_of()
    optimizer = neurms.create(rule, model)
    train(model, optimizer, 1)
    assert not any("seed" in state for state in optimizer.state.values())


@pytest.mark.parametrize(
    ("rule", "added"),
    [
        ("alice", {"switching": "complement", "residual": "optimal"}),
        ("shared_basis", {"oversampling": 0, "iterations": 1, "norm_iterations": 8}),
        ("racs", {"fit": "power"}),
    ],
)
def test_groups_saved_before_a_setting_was_added(rule: str, added: dict[str, Any]) -> None:
    model = model_of()
    optimizer = neurms.create(rule, model)
    train(model, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        for name in added:
            del group[name]
    fresh = neurms.create(rule, copy.deepcopy(model))
    fresh.load_state_dict(saved)
    (group,) = fresh.param_groups
    assert {name: group[name] for name in added} == added
