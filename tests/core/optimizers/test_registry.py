"""One name, one optimizer: the table, the public index and the settings agree."""

from __future__ import annotations

import inspect
import math

import pytest
from torch import nn

import neurms
from neurms.core.ground.errors import NonFiniteError
from neurms.core.optimizers.base import PreconditionedOptimizer
from neurms.core.optimizers.registry import available, create, is_torch, optimizer_class
from neurms.core.optimizers.settings import COMMON_DEFAULTS
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
    with pytest.raises(ValueError, match="name='adamx' is not known; choose one of"):
        create("adamx", small_model())
    with pytest.raises(ValueError, match="rule='adamw' is not known; choose one of"):
        optimizer_class("adamw")


@pytest.mark.parametrize("name", RULES)
def test_unknown_setting(name: str) -> None:
    with pytest.raises(TypeError, match="has no setting 'lerning_rate'"):
        make(name, small_model(), lerning_rate=0.1)
