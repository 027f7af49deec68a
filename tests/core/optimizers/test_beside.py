"""Parameter groups beside a model, for every rule and for torch's own optimizers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import neurms
from neurms.core.ground.errors import MissingParametersError
from tests.core.optimizers.training import GRADIENT_RULES


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(5, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 4), nn.Linear(4, 3)]
    return nn.Sequential(*layers).double()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        inputs = torch.randn(7, 5, generator=generator, dtype=torch.float64)
        model(inputs).square().mean().backward()
        optimizer.step()


def trained(name: str, groups: Any = None, **settings: Any) -> list[Tensor]:
    model = network()
    made = None if groups is None else groups(model)
    train(model, neurms.create(name, model, groups=made, **settings))
    return [p.detach() for p in model.parameters()]


def same(left: list[Tensor], right: list[Tensor]) -> list[bool]:
    return [torch.equal(a, b) for a, b in zip(left, right, strict=True)]


@pytest.mark.parametrize("name", [*GRADIENT_RULES, "neurms"])
def test_groups_of_equal_settings_are_no_groups(name: str) -> None:
    settings = {"rank": 2, "leading": 1} if name == "alice" else {}
    settings = {"rank": 2} if name in ("galore", "fira", "apollo", "sketchy") else settings
    parts = trained(name, lambda m: [{"params": m[4]}, {"params": m[0].parameters()}], **settings)
    assert all(same(parts, trained(name, **settings)))


def test_a_rate_of_its_own_is_that_of_an_optimizer_of_its_own() -> None:
    """In RACS's first step each matrix goes by itself."""
    model, slow, fast = network(), network(), network()
    groups = [{"params": [model[3].weight], "lr": 0.3}]
    train(model, neurms.RACS(model, lr=0.1, groups=groups), steps=1)
    train(slow, neurms.RACS(slow, lr=0.1), steps=1)
    train(fast, neurms.RACS(fast, lr=0.3), steps=1)
    assert torch.equal(model[0].weight, slow[0].weight)
    assert torch.equal(model[3].weight, fast[3].weight)
    assert not torch.equal(slow[3].weight, fast[3].weight)


def test_torch_s_own_optimizers_take_them_alike() -> None:
    def groups(model: nn.Sequential) -> list[dict[str, Any]]:
        return [{"params": model[4], "lr": 0.1, "weight_decay": 0.3}]

    by_name = trained("adamw", groups, lr=0.01)
    model = network()
    rest = [p for layer in (model[0], model[2], model[3]) for p in layer.parameters()]
    adamw = torch.optim.AdamW(
        [{"params": model[4].parameters(), "lr": 0.1, "weight_decay": 0.3}, {"params": rest}],
        lr=0.01,
    )
    train(model, adamw)
    assert all(same(by_name, [p.detach() for p in model.parameters()]))


def test_decay_holds_for_all_that_a_group_names() -> None:
    """For what AdamW takes of it, too, as in torch: the norm, the biases and RACS's head."""
    model = network()
    groups = [{"params": [model[2].weight, model[4].weight], "lr": 0.1, "weight_decay": 0.5}]
    optimizer = neurms.RACS(model, lr=0.1, fallback_lr=0.1, groups=groups)
    twin = network()
    named = [twin[2].weight, twin[4].weight]
    adamw = torch.optim.AdamW(named, lr=0.1, weight_decay=0.5, eps=1e-8)
    train(model, optimizer, steps=1)
    generator = torch.Generator().manual_seed(1)
    twin(torch.randn(7, 5, generator=generator, dtype=torch.float64)).square().mean().backward()
    adamw.step()
    for own, theirs in zip((model[2].weight, model[4].weight), named, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-12, atol=1e-14)
    assert optimizer.param_groups[1]["fallback_weight_decay"] == 0.0


def test_a_group_may_name_another_rule_or_adamw() -> None:
    model = network()
    groups = [{"params": model[4], "rule": "rmnp"}, {"params": model[0], "rule": "fallback"}]
    rows = {r.name: (r.rule, r.reason) for r in neurms.NeuRMS(model, groups=groups).plan()}
    assert rows["4.weight"][0] == "rmnp"
    assert rows["4.bias"] == ("fallback", "bias")
    assert rows["0.weight"] == rows["0.bias"] == ("fallback", "asked for by its group")
    assert rows["3.weight"][0] == rows["3.bias"][0] == "neurms"
    mixed = network()
    train(mixed, optimizer := _mixed(mixed))
    assert {row.rule for row in optimizer.plan()} == {"neurms", "rmnp", "fallback"}
    assert optimizer.plan().state_bytes == optimizer.state_bytes()


def _mixed(model: nn.Sequential) -> neurms.NeuRMS:
    groups = [{"params": model[4], "rule": "rmnp"}, {"params": model[0], "rule": "fallback"}]
    return neurms.NeuRMS(model, groups=groups)


def test_schedulers_have_one_function_for_each_group() -> None:
    model = network()
    groups = [{"params": model[4], "lr": 0.5}, {"params": model[0], "lr": 0.1}]
    optimizer = neurms.RACS(model, lr=0.01, groups=groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, [lambda n: 1.0, lambda n: 0.5**n, lambda n: 1.0 + n]
    )
    train(model, optimizer, steps=1)
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.5, 0.05, 0.02])
    assert optimizer.fallback_lr(optimizer.param_groups[2]) == pytest.approx(2e-3)


@pytest.mark.parametrize("name", ["racs", "neurms"])
def test_state_goes_round_and_to_other_orders(name: str) -> None:
    def build(order: int) -> tuple[nn.Sequential, torch.optim.Optimizer]:
        model = network()
        groups = [{"params": model[4], "lr": 0.05}, {"params": model[0], "weight_decay": 0.1}]
        return model, neurms.create(name, model, groups=groups[::order])

    model, optimizer = build(1)
    train(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    weights = copy.deepcopy(model.state_dict())
    train(model, optimizer)
    for order in (1, -1):
        again, other = build(order)
        again.load_state_dict(weights)
        other.load_state_dict(saved)
        train(again, other)
        assert all(same(list(model.parameters()), list(again.parameters())))


def test_parameters_are_added_as_ever() -> None:
    model, late = network(), nn.Linear(3, 3).double()
    optimizer = neurms.RACS(model, groups=[{"params": model[4], "lr": 0.1}])
    optimizer.add_param_group({"params": [("late", late.weight)], "lr": 0.2})
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.02, 0.2]
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [("again", model[0].weight)]})


@pytest.mark.parametrize("name", ["racs", "neurms", "adamw"])
def test_state_is_predicted(name: str) -> None:
    model = network()
    groups = [{"params": model[4], "lr": 0.1}]
    settings = {"momentum": 0.9} if name == "neurms" else {}
    predicted = neurms.memory_report(model, name, groups=groups, **settings).state_bytes
    optimizer = neurms.create(name, model, groups=groups, **settings)
    train(model, optimizer, steps=1)
    if name == "adamw":
        assert predicted == sum(
            value.nbytes for state in optimizer.state.values() for value in state.values()
        )
    else:
        assert predicted == optimizer.state_bytes()


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        (lambda m: {"params": m[4]}, TypeError, "groups=dict must be a list of dictionaries"),
        (lambda m: m[4], TypeError, "groups=Linear must be a list"),
        (lambda m: [m[4]], TypeError, r"groups\[0\]=Linear must be a dictionary"),
        (lambda m: [{"lr": 0.1}], MissingParametersError, r"groups\[0\] has no 'params'"),
        (lambda m: [{"params": ["4"]}], TypeError, "holds a str; pass parameters of the model"),
        (lambda m: [{"params": {m[4].weight}}], TypeError, "must have an order"),
        (lambda m: [{"params": nn.Linear(2, 2)}], ValueError, "no parameter of the model"),
        (lambda m: [{"params": m[0]}, {"params": m[0].bias}], ValueError,
         r"'0\.bias' is in groups\[0\] and groups\[1\]; leave it in one"),
        (lambda m: [{"params": m[0], "learning_rate": 0.1}], TypeError, "write lr"),
        (lambda m: [{"params": m[0], "weight_dcay": 0.1}], TypeError, "mean 'weight_decay'"),
        (lambda m: [{"params": m[0], "exclude": ["0"]}], TypeError, "whole optimizer; pass it to"),
        (lambda m: [{"params": m[0], "update": "backward"}], TypeError, "whole optimizer"),
        (lambda m: [{"params": m[0], "lr": -1.0}], ValueError, "lr=-1.0"),
        (lambda m: [{"params": m[0], "rule": "rcas"}], ValueError, "'rcas'"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused(groups: Any, error: Any, message: str) -> None:
    model = network()
    for rule in (neurms.RACS, neurms.NeuRMS):
        with pytest.raises(error, match=message):
            rule(model, groups=groups(model))
        assert not any(layer._forward_hooks for layer in model)


def test_notes_of_the_user_s_are_kept() -> None:
    model = network()
    optimizer = neurms.RACS(model, groups=[{"params": model[0], "name": "body", "lr_scale": 0.5}])
    assert optimizer.param_groups[0]["name"] == "body"


def test_groups_want_a_model() -> None:
    model = network()
    with pytest.raises(TypeError, match="groups= goes beside a model"):
        neurms.RACS(model.parameters(), groups=[{"params": model[0]}])
    with pytest.raises(TypeError, match=r"parameter groups beside it as groups=\[...\]"):
        neurms.NeuRMS([{"params": model.parameters()}])
