"""Layers that variant P keeps from step to step: a change is seen, as by fresh ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neurms import GradientPreconditioner, NeuRMS, NonFiniteError
from neurms.core.unitwise.gradient_layers import Known
from tests.core.unitwise.neurms_models import cnn, images, vectors, wide
from tests.core.unitwise.test_gradient_mover import backward

Change = Callable[[NeuRMS, nn.Module], object]


def first(model: nn.Module) -> nn.Module:
    return next(m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))


def add(optimizer: NeuRMS, model: nn.Module) -> None:
    model.register_parameter("extra", nn.Parameter(torch.ones(3, 4, dtype=torch.float64)))
    optimizer.add_param_group({"params": [("extra", model.get_parameter("extra"))]})


def replace(optimizer: NeuRMS, model: nn.Module) -> None:
    weight = first(model).weight
    assert isinstance(weight, Tensor)
    optimizer.state[weight] = copy.deepcopy(optimizer.state[weight])
    optimizer.state[weight]["q"].mul_(3.0)


CHANGES: dict[str, Change] = {
    "rate": lambda o, m: o.param_groups[0].update(lr=0.2),
    "decay": lambda o, m: o.param_groups[0].update(weight_decay=0.3),
    "kappa": lambda o, m: o.param_groups[0].update(kappa=1.2),
    "momentum": lambda o, m: o.param_groups[0].update(momentum=0.7),
    "frozen bias": lambda o, m: first(m).bias.requires_grad_(False),  # type: ignore[operator,union-attr]
    "frozen weight": lambda o, m: first(m).weight.requires_grad_(False),  # type: ignore[operator,union-attr]
    "dtype": lambda o, m: m.float(),
    "low precision": lambda o, m: m.bfloat16(),
    "added": add,
    "replaced state": replace,
    "no state": lambda o, m: o.state.clear(),
    "loaded": lambda o, m: o.load_state_dict(copy.deepcopy(o.state_dict())),
    "divided": lambda o, m: o.param_groups.append(
        {**o.param_groups[0], "params": [o.param_groups[0]["params"].pop()], "lr": 0.3}
    ),
}


def steps(model: nn.Module, change: Change, fresh: bool) -> list[Tensor]:
    optimizer = NeuRMS(model, variant="P", lr=0.02, weight_decay=0.01)
    batch = images() if any(isinstance(m, nn.Conv2d) for m in model.modules()) else vectors()
    for number in range(7):
        if number == 3:
            change(optimizer, model)
        if fresh:
            optimizer._movers.clear()
        x = batch[0].to(next(model.parameters()).dtype)
        model.zero_grad()
        nn.functional.cross_entropy(model(x), batch[1]).backward()
        if (extra := getattr(model, "extra", None)) is not None:
            extra.grad = torch.arange(12.0, dtype=torch.float64).view(3, 4)
        optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("make", [wide, cnn])
@pytest.mark.parametrize("what", CHANGES)
def test_a_change_is_seen(what: str, make: Callable[[], nn.Module]) -> None:
    change = CHANGES[what]
    kept, made = (steps(make().double(), change, fresh) for fresh in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(kept, made, strict=True))
    unchanged = steps(make().double(), lambda o, m: None, fresh=False)
    if what != "loaded":
        assert any(not torch.equal(a, b) for a, b in zip(kept, unchanged, strict=False))


def test_layers_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    keep = Known.keep
    monkeypatch.setattr(Known, "keep", lambda *args: (kept.append(1), keep(*args)))
    model = wide().double()
    optimizer = NeuRMS(model, variant="P")
    for _ in range(5):
        backward(model, vectors())
        optimizer.step()
    assert len(kept) == 1


def test_a_preconditioner_sees_a_state_that_is_loaded() -> None:
    one, other = wide().double(), wide().double()
    scalers = [GradientPreconditioner(model, variant="P") for model in (one, other)]
    for number in range(5):
        for model, scaler in zip((one, other), scalers, strict=True):
            backward(model, vectors())
            assert scaler.precondition_(model.parameters())
        if number == 2:
            scalers[1].load_state_dict(copy.deepcopy(scalers[0].state_dict()))
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["0.weight", "0.bias", "2.weight"])
def test_sums_that_are_not_finite_refuse_a_step_and_change_nothing(name: str, bad: float) -> None:
    """Layers that are known are judged by their sums, and no second read of the gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 200), nn.ReLU(), nn.Linear(200, 200), nn.LayerNorm(200))
    optimizer = NeuRMS(model, lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 9)).square().mean().backward()
        optimizer.step()
    gradient = model.get_parameter(name).grad
    assert gradient is not None
    gradient.view(-1)[-1] = bad
    weights = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(NonFiniteError, match=name):
        optimizer.step()
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    assert str(optimizer.state_dict()["state"]) == str(state)
    gradient.view(-1)[-1] = 0.0
    optimizer.step()
    assert not torch.equal(weights[name], model.get_parameter(name))


def test_known_layers_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[torch.Size] = []

    def noted(tensors: Any, bounds: Any) -> bool:
        read.extend(x.shape for x in tensors)
        return True

    model = nn.Sequential(nn.Linear(9, 200), nn.ReLU(), nn.Linear(200, 200), nn.LayerNorm(200))
    optimizer = NeuRMS(model, lr=1e-3)
    monkeypatch.setattr("neurms.core.optimizers.gradients.within", noted)
    for _ in range(3):
        read.clear()
        optimizer.zero_grad()
        model(torch.randn(4, 9)).square().mean().backward()
        optimizer.step()
    assert set(read) == {torch.Size([200])}
    assert len(read) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [1e36, 1e38, 3e38])
@pytest.mark.parametrize("name", ["0.weight", "0.bias", "2.weight"])
def test_known_layers_refuse_what_new_ones_do(name: str, value: float, dtype: torch.dtype) -> None:
    """Finite numbers whose sum of squares is finite in float64, and its root not in float32."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 200), nn.ReLU(), nn.Linear(200, 200)).to(dtype)
    optimizer = NeuRMS(model, lr=1e-3, head="rule", nonfinite="skip")
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 9, dtype=dtype)).square().mean().backward()
        optimizer.step()
    gradient = model.get_parameter(name).grad
    assert gradient is not None
    gradient.fill_(value)
    twin = copy.deepcopy(model)
    new = NeuRMS(twin, lr=1e-3, head="rule", nonfinite="skip")
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        q.grad = p.grad
    for one in (optimizer, new):
        one.step()
    assert optimizer.skipped_steps == new.skipped_steps
    if value >= 1e38:
        assert optimizer.skipped_steps == (dtype is torch.float32)
    tensors = [x for state in optimizer.state.values() for x in state.values()]
    assert all(bool(x.isfinite().all()) for x in tensors if isinstance(x, Tensor))
