"""Movers that judge gradients as they move: a step is whole, or nothing has changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import neurms
from neurms.core.ground.errors import NonFiniteError
from neurms.core.optimizers.base import PreconditionedOptimizer
from neurms.core.optimizers.mover import Mover, Share

RULES: list[tuple[str, dict[str, Any]]] = [
    ("neurms", {"variant": "P"}),
    ("neurms", {"variant": "P", "momentum": 0.6}),
    ("neurms", {"momentum": 0.6, "nesterov": True, "moments": "average"}),
    ("racs", {}),
    ("racs", {"fit": "tracked"}),
    ("racs", {"fit": "sums", "bias_correction": True}),
]
BAD = [float("nan"), float("inf"), -float("inf")]


def trained(rule: str, backend: str, **settings: Any) -> tuple[nn.Module, PreconditionedOptimizer]:
    """Return a model after two steps: all state is there then."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 200), nn.LayerNorm(200), nn.Linear(200, 160))
    optimizer = neurms.create(rule, model, lr=1e-3, head="rule", backend=backend, **settings)
    for _ in range(2):
        give_gradients(model)
        optimizer.step()
    return model, optimizer


def give_gradients(model: nn.Module, scale: float = 1.0) -> None:
    for parameter in model.parameters():
        parameter.grad = scale * torch.randn_like(parameter)


def judged(optimizer: PreconditionedOptimizer, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Return a list that grows by what every attempt of a mover says."""
    verdicts: list[bool] = []
    mover = optimizer.mover_of(optimizer.rule)
    made = mover.attempt

    def attempt(views: Any) -> bool:
        verdicts.append(made(views))
        return verdicts[-1]

    monkeypatch.setattr(mover, "attempt", attempt)
    return verdicts


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize(("rule", "settings"), RULES)
@pytest.mark.parametrize("place", ["0.weight", "2.weight", "2.bias", "1.weight"])
def test_a_bad_gradient_changes_nothing(
    rule: str,
    settings: dict[str, Any],
    place: str,
    value: float,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, optimizer = trained(rule, backend, nonfinite="skip", **settings)
    verdicts = judged(optimizer, monkeypatch)
    give_gradients(model)
    bad = model.get_parameter(place).grad
    assert bad is not None
    bad.view(-1)[bad.numel() // 2 + 1] = value
    weights = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.step()
    assert optimizer.skipped_steps == 1
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    after = optimizer.state_dict()["state"]
    for index, own in state.items():
        for key, kept in own.items():
            now = after[index][key]
            assert torch.equal(now, kept) if isinstance(kept, torch.Tensor) else now == kept, key
    # What AdamW takes is looked at first.
    of_rule = not optimizer.routes[model.get_parameter(place)].is_fallback
    assert verdicts == ([False] if of_rule else [])
    optimizer.nonfinite = "raise"
    with pytest.raises(NonFiniteError, match=place):
        optimizer.step()


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize(("rule", "settings"), RULES)
def test_the_step_is_that_of_a_mover_that_does_not_judge(
    rule: str,
    settings: dict[str, Any],
    backend: str,
    scale: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = []
    for judges in (True, False):
        model, optimizer = trained(rule, backend, **settings)
        verdicts = judged(optimizer, monkeypatch)
        if not judges:
            monkeypatch.setattr(optimizer.mover_of(optimizer.rule), "judges", lambda views: False)
        for _ in range(2):
            give_gradients(model, scale)
            optimizer.step()
        # RACS judges by its native form.
        by_the_way = rule == "neurms" or backend == "auto"
        assert verdicts == [by_the_way, by_the_way] * judges
        found.append([weight.detach() for weight in model.parameters()])
    for own, other in zip(*found, strict=True):
        assert torch.equal(own, other)


def test_gradients_that_nobody_can_judge_by_the_way_are_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of 1e31 the sums of squares say nothing, and a root of them is still a float32."""
    model, optimizer = trained("neurms", "auto", variant="P")
    verdicts = judged(optimizer, monkeypatch)
    before = [weight.detach().clone() for weight in model.parameters()]
    give_gradients(model, 1e31)
    model[1].weight.grad = model[1].bias.grad = None  # type: ignore[union-attr,index]
    optimizer.step()
    assert verdicts == [False]
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert moved == [True, True, False, False, True, True]
    assert all(weight.isfinite().all() for weight in model.parameters())


def test_a_step_whose_state_is_not_there_yet_is_judged_first() -> None:
    model = nn.Linear(200, 300)
    optimizer = neurms.create("racs", model, lr=1e-3, nonfinite="skip", head="rule")
    give_gradients(model)
    model.weight.grad[7, 7] = float("nan")  # type: ignore[index]
    optimizer.step()
    assert optimizer.skipped_steps == 1  # type: ignore[attr-defined]
    assert not optimizer.state


@pytest.mark.parametrize("form", ["bfloat16", "by columns"])
def test_racs_attempts_no_step_that_its_native_form_does_not_serve(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = nn.Parameter(torch.randn(300, 200))
    weight.data = weight.data.bfloat16() if form == "bfloat16" else weight.data.t()
    optimizer = neurms.create("racs", [weight], lr=1e-3)
    assert isinstance(optimizer, PreconditionedOptimizer)
    verdicts = judged(optimizer, monkeypatch)
    for _ in range(3):
        before = weight.detach().clone()
        weight.grad = torch.randn_like(weight)
        optimizer.step()
        assert not torch.equal(weight, before)
    assert not verdicts


def test_a_mover_does_not_judge_unless_it_says_so() -> None:
    share: Share = (neurms.create("rmnp", [nn.Parameter(torch.ones(3, 3))]).mover_of("rmnp"), ())  # type: ignore[attr-defined]
    assert isinstance(share[0], Mover)
    assert not Mover.judges(share[0], ())
    assert not Mover.attempt(share[0], ())
