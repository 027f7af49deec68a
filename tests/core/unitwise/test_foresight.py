"""What one pass over D and H foresees is what summing, committing and scaling give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import neurms
from neurms.core.structures.unit_feature import UnitFeatureDiagonal
from neurms.core.unitwise.foresight import commit_, foresee
from neurms.core.unitwise.statistics import PendingSums


def state_of(structure: UnitFeatureDiagonal, m: int = 5, n: int = 4) -> dict[str, Any]:
    state: dict[str, Any] = {"step": 3, "v": torch.rand(m, dtype=torch.float64)}
    return state | ({"u": torch.rand(n, dtype=torch.float64)} if structure.factored else {})


@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_foresight_is_the_formula_and_its_commit_moves_the_state(
    factored: bool, reduction: Any
) -> None:
    structure = UnitFeatureDiagonal(beta=0.8, factored=factored, s_max=1.5)
    state = state_of(structure)
    d, h = torch.randn(6, 5).double(), torch.randn(6, 4).double()
    v = 0.8 * state["v"] + 0.2 * d.square().sum(0) * (6 if reduction == "mean" else 1 / 6)
    s = (v / (1 - 0.8**4) + 1e-8).rsqrt().clamp(0, 1.5)
    ahead = foresee(d, h, structure, state, reduction, "eager")
    assert ahead is not None
    assert ahead.scaled is not None
    torch.testing.assert_close(ahead.scaled[0], d * s)
    torch.testing.assert_close(ahead.error_sum, d.sum(0))
    pending = PendingSums()
    pending.add(ahead.sums)
    other = {k: x.clone() if isinstance(x, torch.Tensor) else x for k, x in state.items()}
    state["step"] = other["step"] = 4
    assert ahead.commit_(structure, state, pending)
    torch.testing.assert_close(state["v"], v)
    factors = commit_(structure, other, pending, reduction, "eager")
    assert factors is not None
    for key in ("v", "u"):
        assert (key in state) == (key in other)
        if key in state:
            torch.testing.assert_close(state[key], other[key])
    for one, two in zip(ahead.factors, factors, strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            torch.testing.assert_close(one, two)
    if factored:
        u = state["u"]
        torch.testing.assert_close(ahead.scaled[1], h * (u / (1 - 0.8**4) + 1e-8).rsqrt())
    else:
        assert ahead.scaled[1] is h
    unscaled = foresee(d, h, structure, other | {"step": 3}, reduction, "eager", scale=False)
    assert unscaled is not None
    assert unscaled.scaled is None


@pytest.mark.parametrize(
    "change",
    [
        lambda state, pending: state["v"].mul_(2),
        lambda state, pending: state.update(v=state["v"].clone()),
        lambda state, pending: state.update(step=9),
        lambda state, pending: setattr(pending, "units", pending.units.clone()),
    ],
)
def test_a_foresight_that_no_longer_holds_commits_nothing(
    change: Callable[[dict[str, Any], PendingSums], Any],
) -> None:
    structure = UnitFeatureDiagonal()
    state = state_of(structure)
    ahead = foresee(torch.randn(6, 5).double(), torch.ones(6, 4), structure, state, "mean", "eager")
    assert ahead is not None
    pending = PendingSums()
    pending.add(ahead.sums)
    state["step"] = 4
    change(state, pending)
    before = state["v"].clone()
    assert not ahead.commit_(structure, state, pending)
    assert torch.equal(state["v"], before)


def test_relative_clips_have_no_fused_form() -> None:
    structure = UnitFeatureDiagonal(clip="relative")
    state = state_of(structure)
    d = torch.randn(6, 5).double()
    assert foresee(d, torch.ones(6, 4), structure, state, "mean", "eager") is None
    pending = PendingSums(d.square().sum(0), None, 6)
    assert commit_(structure, state, pending, "mean", "eager") is None


@pytest.mark.parametrize("variant", ["U", "F"])
@pytest.mark.parametrize("width", [6, 256])
def test_settings_that_change_between_backward_and_step_are_obeyed(
    variant: Any, width: int
) -> None:
    """Small layers run eagerly, large ones natively; both must notice."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))
    optimizer = neurms.NeuRMS(model, lr=1e-2, variant=variant, update="backward")
    layer = next(iter(optimizer._layers))
    for step in range(4):
        model(torch.randn(8, width)).square().mean().backward()
        observed = layer.observed.copy()
        before = optimizer.state[layer.weight].get("v", torch.zeros(width)).clone()
        optimizer.param_groups[0]["beta"] = 0.9 if step == 2 else 0.99
        optimizer.step()
        assert observed.units is not None
        beta = optimizer.param_groups[0]["beta"]
        expected = beta * before + (1 - beta) * observed.units * 8
        torch.testing.assert_close(optimizer.state[layer.weight]["v"], expected)
        optimizer.zero_grad()
