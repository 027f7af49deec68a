"""One name, one optimizer: the table, the public index and the settings agree."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

import neurms
from neurms.core.ground.errors import NonFiniteError
from neurms.core.optimizers.base import PreconditionedOptimizer
from neurms.core.optimizers.registry import available, create, is_torch, optimizer_class
from neurms.core.optimizers.settings import COMMON_DEFAULTS
from neurms.core.structures.one_sided_diagonal import RowNormalized
from tests.core.optimizers.training import RULES, batch, make, small_model, train

TORCH = ["sgd", "rmsprop", "adam", "adamw", "adafactor"]


def test_names_are_ours_and_then_torchs() -> None:
    names = available()
    assert names == [*RULES, *TORCH]
    assert [name for name in names if is_torch(name)] == TORCH
    assert neurms.available() == names


@pytest.mark.parametrize("name", RULES)
def test_class_and_public_name(name: str) -> None:
    found = optimizer_class(name)
    assert issubclass(found, PreconditionedOptimizer)
    assert found.rule == name
    assert getattr(neurms, found.__name__) is found


@pytest.mark.parametrize("name", RULES)
def test_signature_is_explicit(name: str) -> None:
    """Editors, command lines and YAML files read the settings off the signature."""
    first, *settings = list(inspect.signature(optimizer_class(name)).parameters.values())
    assert first.name == ("model" if name == "neurms" else "params")
    assert settings[0].name == "lr"
    assert settings[-1].kind is inspect.Parameter.VAR_KEYWORD
    assert all(p.annotation is not p.empty for p in [first, *settings])
    assert not {p.name for p in settings} & set(COMMON_DEFAULTS)


@pytest.mark.parametrize("name", RULES)
def test_docstring_has_every_part(name: str) -> None:
    text = inspect.getdoc(optimizer_class(name)) or ""
    order = [text.index(part) for part in ("Args:", "Raises:", "Reference:", "Example:", ">>> ")]
    assert order == sorted(order)
    for parameter in list(inspect.signature(optimizer_class(name)).parameters)[:-1]:
        assert f"{parameter}: " in text


def overfitted(name: str, lr: float) -> float:
    """Return the loss of one batch after 30 steps on it, in proportion to the first."""
    model = small_model()
    # The fallback stands still, so that what is learnt is the rule's doing.
    optimizer = make(name, model, lr=lr, fallback_lr=0.0)
    inputs, targets = batch(0)
    losses = []
    for _ in range(31):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        losses.append(float(loss.detach()))
        loss.backward()
        try:
            optimizer.step()
        except NonFiniteError:
            return math.inf
    return losses[-1] / losses[0]


@pytest.mark.parametrize("name", RULES)
def test_some_learning_rate_learns(name: str) -> None:
    assert min(overfitted(name, lr) for lr in (1e-3, 1e-2, 1e-1, 1.0, 10.0)) < 0.5


@pytest.mark.parametrize("name", TORCH)
def test_torchs_own_take_models_and_parameters(name: str) -> None:
    model = small_model()
    for params in (model, model.parameters()):
        assert len(create(name, params, lr=0.1).param_groups[0]["params"]) == len(
            list(model.parameters())
        )
    train(model, create(name, model), 1)


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"name='adamx' .*'adam'\?\); choose one of"):
        create("adamx", small_model())
    with pytest.raises(ValueError, match="rule='adamw' is not known; choose one of"):
        optimizer_class("adamw")


@pytest.mark.parametrize("name", RULES)
def test_unknown_setting(name: str) -> None:
    with pytest.raises(TypeError, match="has no setting 'lerning_rate'"):
        make(name, small_model(), lerning_rate=0.1)


class RowSGD(neurms.PreconditionedOptimizer):
    """Rows of unit length: a rule of somebody who uses the library."""

    rule = "row_sgd"

    def __init__(self, params: Any, lr: float = 0.5, power: float = 1.0, **common: Any) -> None:
        super().__init__(params, {"lr": lr, "power": power}, common)

    @classmethod
    def recipe(cls, settings: Mapping[str, Any]) -> neurms.Recipe:
        """Return the normalisation of rows."""
        return neurms.Recipe((RowNormalized(),))


def test_a_registered_rule_is_known_everywhere() -> None:
    assert "row_sgd" not in available()
    assert neurms.register(RowSGD) is RowSGD
    assert "row_sgd" in available()
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = create("row_sgd", model, weight_decay=0.1)
    assert isinstance(optimizer, RowSGD)
    rules = {row.name: row.rule for row in optimizer.plan()}
    assert rules == {
        "0.weight": "row_sgd",
        "0.bias": "fallback",
        "1.weight": "fallback",
        "1.bias": "fallback",
    }
    predicted = neurms.memory_report(model, "row_sgd")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert predicted.state_bytes == optimizer.state_bytes() > 0


def test_another_optimizers_group_takes_a_registered_rule() -> None:
    neurms.register(RowSGD)
    first, second = nn.Parameter(torch.zeros(2, 4)), nn.Parameter(torch.zeros(2, 4))
    optimizer = neurms.RACS([{"params": [first]}, {"params": [second], "rule": "row_sgd"}])
    assert optimizer.param_groups[1]["power"] == 1.0
    first.grad, second.grad = torch.full((2, 4), 3.0), torch.full((2, 4), 3.0)
    optimizer.step()
    rate = optimizer.param_groups[1]["lr"]
    torch.testing.assert_close(second.data, torch.full((2, 4), -rate / 2))


def test_a_class_may_be_registered_twice_but_not_two_under_one_name() -> None:
    neurms.register(RowSGD)
    neurms.register(RowSGD)

    class Other(RowSGD):
        pass

    with pytest.raises(ValueError, match="'row_sgd' is taken already"):
        neurms.register(Other)
    assert optimizer_class("row_sgd") is RowSGD


@pytest.mark.parametrize("name", ["racs", "adamw", "fallback"])
def test_names_of_others_are_refused(name: str) -> None:
    taken = type("Taken", (RowSGD,), {"rule": name})
    with pytest.raises(ValueError, match=f"rule='{name}' is taken already"):
        neurms.register(taken)


@pytest.mark.parametrize("name", ["row sgd", "", None, 3])
def test_names_that_are_none_are_refused(name: Any) -> None:
    with pytest.raises(ValueError, match="must be a snake_case name"):
        neurms.register(type("Unnamed", (RowSGD,), {"rule": name}))


@pytest.mark.parametrize("rule", [nn.Linear, "row_sgd", RowSGD.recipe])
def test_other_things_are_refused(rule: Any) -> None:
    with pytest.raises(TypeError, match=r"must be a subclass of neurms\.PreconditionedOptimizer"):
        neurms.register(rule)


def test_an_unknown_setting_is_answered_by_the_rules_own() -> None:
    with pytest.raises(TypeError, match=r"row_sgd has no setting 'lerning_rate'") as refused:
        RowSGD([nn.Parameter(torch.zeros(2, 2))], lerning_rate=0.1)
    assert "its own settings are ['lr', 'power']" in str(refused.value)
    assert "'weight_decay'" in str(refused.value)
