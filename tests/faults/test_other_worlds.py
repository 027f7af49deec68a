"""Fake tensors, other default devices, models that change dtype, scalers, no rate."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import neurms
from neurms.core.ground.errors import UnsupportedTrainingError
from tests.faults.rules import RULES, SMALL


def trained(rule: str, *, steps: int = 3, **settings: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 6, 2), nn.GELU(), nn.Flatten(), nn.Linear(24, 9))
    model.append(nn.Linear(9, 4))
    optimizer = neurms.create(rule, model, **SMALL.get(rule, {}), **settings)
    steps_of(model, optimizer, steps)
    return model, optimizer


def steps_of(model: nn.Module, optimizer: Any, steps: int) -> None:
    generator = torch.Generator().manual_seed(1)
    like = next(model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        signal = torch.randn(5, 3, 5, generator=generator, device="cpu").to(like)
        model(signal).square().mean().backward()
        optimizer.step()


def weights_of(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("rule", RULES)
def test_another_default_device_changes_nothing(rule: str) -> None:
    plain, _ = trained(rule)
    model, optimizer = trained(rule, steps=0)
    with torch.device("meta"):
        steps_of(model, optimizer, 3)
    torch.testing.assert_close(weights_of(model), weights_of(plain), rtol=0, atol=0)


@pytest.mark.parametrize("rule", RULES)
def test_a_step_on_fake_tensors_makes_the_state_that_the_plan_says(rule: str) -> None:
    with FakeTensorMode():
        _, optimizer = trained(rule, steps=2)
    assert optimizer.state_bytes() == optimizer.plan().state_bytes
    assert {state["step"] for state in optimizer.state.values()} == {2}


@pytest.mark.parametrize("rule", RULES)
def test_a_model_that_becomes_double_is_saved_and_loaded(rule: str) -> None:
    model, optimizer = trained(rule, steps=2)
    model.double()
    steps_of(model, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    steps_of(model, optimizer, 1)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


class TestAGradScaler:
    def test_is_refused_without_its_scale(self) -> None:
        model, optimizer = trained("neurms", steps=0, variant="U")
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(model(torch.randn(2, 3, 5)).sum()).backward()
        with pytest.raises(UnsupportedTrainingError, match=r"loss_scale=scaler\.get_scale"):
            scaler.step(optimizer)

    def test_that_is_off_is_no_scaler(self) -> None:
        model, optimizer = trained("neurms", steps=0, variant="U")
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        scaler.scale(model(torch.randn(2, 3, 5)).sum()).backward()
        scaler.step(optimizer)
        assert optimizer.state[model[0].weight]["step"] == 1

    @pytest.mark.parametrize("update", ["step", "backward"])
    def test_is_told_from_those_who_only_ask(self, update: Any) -> None:
        _, optimizer = trained("neurms", steps=0, update=update)
        # As Lightning's plugin for mixed precision asks before it clips.
        assert getattr(optimizer, "_step_supports_amp_scaling", False) is False


@pytest.mark.parametrize("rule", ["rmnp", "soap", "neurms"])
def test_nothing_moves_without_a_rate_and_all_follow_it(rule: str) -> None:
    model, optimizer = trained(rule, steps=0, lr=0.0)
    before = weights_of(model)
    steps_of(model, optimizer, 2)
    torch.testing.assert_close(weights_of(model), before, rtol=0, atol=0)
    moved = []
    for rate in (1e-4, 1e-2):
        for group in optimizer.param_groups:
            group["lr"] = rate
        start = weights_of(model)
        steps_of(model, optimizer, 1)
        pairs = zip(weights_of(model), start, strict=True)
        moved.append([float((now - then).abs().max()) for now, then in pairs])
    assert all(0 < low < high for low, high in zip(*moved, strict=True))


@pytest.mark.parametrize("update", ["step", "backward"])
def test_ascent_is_an_error_where_backward_descends(update: Any) -> None:
    model = nn.Linear(3, 2)
    if update == "step":
        neurms.NeuRMS(model, maximize=True, variant="U").detach()
        return
    with pytest.raises(UnsupportedTrainingError, match="maximize=True cannot go"):
        neurms.NeuRMS(model, update=update, maximize=True, variant="U")
    optimizer = neurms.NeuRMS(model, update=update, variant="U")
    optimizer.param_groups[0]["maximize"] = True
    before = weights_of(model)
    with pytest.raises(UnsupportedTrainingError, match="maximize=True cannot go"):
        model(torch.ones(1, 3)).sum().backward()
    torch.testing.assert_close(weights_of(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("rule", RULES)
def test_two_rates_at_once_are_refused(rule: str) -> None:
    with pytest.raises(ValueError, match="lr holds 2 numbers"):
        neurms.create(rule, nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), lr=torch.ones(2))
