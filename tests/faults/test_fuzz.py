"""No argument and no state dict brings anything but success or an error of our own."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from neurms.core.ground.errors import CheckpointError, NeurmsError, NonFiniteError
from tests.core.optimizers.training import RULES, SETTINGS, assert_same_state
from tests.faults.fuzzing import damaged, odd_settings

FEW = settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.too_slow],
)
MANY = settings(FEW, max_examples=600)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 2))


def backward(of: nn.Module) -> None:
    of(torch.linspace(-1.0, 1.0, 15).view(5, 3)).square().mean().backward()


def hooks(of: nn.Module) -> list[Any]:
    found = [hook for m in of.modules() for hook in m._forward_hooks.values()]
    return found + [m for m in of.modules() if type(m).__name__ == "_TappedLinear"]


def construct(rule: str, chosen: dict[str, Any]) -> None:
    """Construct and take two steps; an error must be typed and name a setting."""
    import neurms

    net = model()
    before = copy.deepcopy(net.state_dict())
    arguments = {**({"lr": 0.01} if rule == "shared_basis" else {}), **chosen}
    optimizer, refusal = None, ""
    try:
        optimizer = neurms.create(rule, net, **arguments)
    except (TypeError, ValueError, NeurmsError) as error:
        refusal = repr(error)
    if optimizer is None:
        assert any(name in refusal for name in chosen), f"{refusal} names none of {chosen}"
        assert not hooks(net)
        assert_same_state(dict(before), dict(net.state_dict()))
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            try:
                backward(net)
                optimizer.step()
            except NonFiniteError:  # a great lr makes infinite losses
                break
            optimizer.zero_grad()


def trained(rule: str) -> tuple[nn.Module, Any]:
    import neurms

    net = model()
    own = {
        k: min(v, 2) if k in ("rank", "leading") else v for k, v in SETTINGS.get(rule, {}).items()
    }
    optimizer = neurms.create(rule, net, **own)
    for _ in range(2):
        backward(net)
        optimizer.step()
        optimizer.zero_grad()
    return net, optimizer


def load(rule: str, pick: Any) -> None:
    """Load a damaged state dict: refused with nothing changed, or taken and trained on."""
    net, optimizer = trained(rule)
    before, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(net.state_dict())
    bad = damaged(optimizer.state_dict(), pick)
    try:
        optimizer.load_state_dict(bad)
    except CheckpointError:
        assert_same_state(optimizer.state_dict(), before)
        assert_same_state(dict(net.state_dict()), dict(weights))
    backward(net)
    try:
        optimizer.step()
    except NonFiniteError:
        return
    assert all(p.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("rule", RULES)
@FEW
@given(data=st.data())
def test_constructor_arguments(rule: str, data: st.DataObject) -> None:
    construct(rule, data.draw(odd_settings(rule)))


@pytest.mark.parametrize("rule", RULES)
@FEW
@given(data=st.data())
def test_state_dicts(rule: str, data: st.DataObject) -> None:
    load(rule, lambda count: data.draw(st.integers(0, count - 1)))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("rule", RULES)
@MANY
@given(data=st.data())
def test_constructor_arguments_at_length(rule: str, data: st.DataObject) -> None:
    construct(rule, data.draw(odd_settings(rule)))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("rule", RULES)
@MANY
@given(data=st.data())
def test_state_dicts_at_length(rule: str, data: st.DataObject) -> None:
    load(rule, lambda count: data.draw(st.integers(0, count - 1)))
