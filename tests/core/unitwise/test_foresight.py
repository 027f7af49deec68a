"""What one pass over D and H foresees is what summing, committing and scaling give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import neurms
from neurms.core.structures.unit_feature import UnitFeatureDiagonal
from neurms.core.unitwise.foresight import foresee
from neurms.core.unitwise.statistics import PendingSums
from tests.core.unitwise.root_truth import inverse_root


def state_of(structure: UnitFeatureDiagonal, m: int = 5, n: int = 4) -> dict[str, Any]:
    state: dict[str, Any] = {"step": 3, "v": torch.rand(m, dtype=torch.float64)}
    return state | ({"u": torch.rand(n, dtype=torch.float64)} if structure.factored else {})


@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_foresight_is_the_formula(factored: bool, reduction: Any) -> None:
    structure = UnitFeatureDiagonal(beta=0.8, factored=factored, s_max=1.5)
    state = state_of(structure)
    d, h = torch.randn(6, 5).double(), torch.randn(6, 4).double()
    v = 0.8 * state["v"] + 0.2 * d.square().sum(0) * (6 if reduction == "mean" else 1 / 6)
    s = inverse_root(v / (1 - 0.8**4)).clamp(0, 1.5)
    found = foresee(d, h, structure, state, reduction, "eager")
    assert found is not None
    ahead, scaled = found
    assert scaled is not None
    torch.testing.assert_close(scaled[0], d * s)
    torch.testing.assert_close(ahead.error_sum, d.sum(0))
    pending = PendingSums()
    pending.add(ahead.sums)
    assert ahead.holds(structure, state, pending)
    torch.testing.assert_close(ahead.moments[0], v)
    torch.testing.assert_close(ahead.factors[0], s)
    assert (ahead.factors[1] is not None) == factored == (len(ahead.moments) == 2)
    if factored:
        u = 0.8 * state["u"] + 0.2 * h.square().mean(0)
        torch.testing.assert_close(ahead.moments[1], u)
        torch.testing.assert_close(scaled[1], h * inverse_root(u / (1 - 0.8**4)))
    else:
        assert scaled[1] is h
    unscaled = foresee(d, h, structure, state, reduction, "eager", scale=False)
    assert unscaled is not None
    assert unscaled[1] is None


@pytest.mark.parametrize(
    "change",
    [
        lambda state, pending: state["v"].mul_(2),
        lambda state, pending: state.update(v=state["v"].clone()),
        lambda state, pending: state.update(step=9),
        lambda state, pending: setattr(pending, "units", pending.units.clone()),
    ],
)
def test_a_foresight_of_another_state_does_not_hold(
    change: Callable[[dict[str, Any], PendingSums], Any],
) -> None:
    structure = UnitFeatureDiagonal()
    state = state_of(structure)
    found = foresee(torch.randn(6, 5).double(), torch.ones(6, 4), structure, state, "mean", "eager")
    assert found is not None
    ahead, _ = found
    pending = PendingSums()
    pending.add(ahead.sums)
    assert ahead.holds(structure, state, pending)
    change(state, pending)
    assert not ahead.holds(structure, state, pending)


def test_relative_clips_have_no_fused_form() -> None:
    structure = UnitFeatureDiagonal(clip="relative")
    state = state_of(structure)
    d = torch.randn(6, 5).double()
    assert foresee(d, torch.ones(6, 4), structure, state, "mean", "eager") is None


@pytest.mark.parametrize("variant", ["U", "F"])
@pytest.mark.parametrize("width", [6, 256])
def test_settings_that_change_between_backward_and_step_are_obeyed(
    variant: Any, width: int
) -> None:
    """Small layers run eagerly, large ones natively; both must notice."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))
    optimizer = neurms.NeuRMS(model, lr=1e-2, variant=variant, update="backward")
    layer = next(iter(optimizer.layers))
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
