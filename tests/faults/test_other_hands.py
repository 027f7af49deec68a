"""What others do with an optimizer: hooks, groups written by hand, swapped parameters, graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import neurms
from tests.faults.rules import RULES, SMALL

TOKENS = torch.arange(20).reshape(4, 5).remainder(11)


class Language(nn.Module):
    """An embedding, attention, a recurrent layer, a convolution and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.table = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.recurrent = nn.GRU(8, 8, batch_first=True)
        self.convolution = nn.Conv1d(8, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.convolution(self.recurrent(x)[0].mT).mT
        logits: Tensor = self.head(self.norm(x))
        return logits


def made(rule: str, model: Any, **settings: Any) -> Any:
    return neurms.create(rule, model, **SMALL.get(rule, {}), **settings)


def loss(model: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.flatten())


def train(
    model: nn.Module, optimizer: Any, steps: int, step: Callable[[], Any] | None = None
) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        (step or optimizer.step)()


def assert_same(a: nn.Module, b: nn.Module, atol: float = 0.0) -> None:
    torch.testing.assert_close(list(a.parameters()), list(b.parameters()), rtol=0, atol=atol)


# -------------------------------------------------------------------- hooks of load_state_dict


@pytest.mark.parametrize("rule", RULES)
def test_what_a_pre_hook_returns_is_loaded(rule: str) -> None:
    model, twin = Language(), Language()
    optimizer, restored = made(rule, model), made(rule, twin)
    train(model, optimizer, 2)
    twin.load_state_dict(model.state_dict())
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        group["param_names"] = [f"net.{name}" for name in group["param_names"]]
    order: list[str] = []

    def unwrap(_: Any, file: dict[str, Any]) -> Any:
        order.append("unwrap")
        return file["optimizer"]

    def rename(_: Any, state: dict[str, Any]) -> None:
        order.append("rename")
        for group in state["param_groups"]:
            group["param_names"] = [n.removeprefix("net.") for n in group["param_names"]]

    restored.register_load_state_dict_pre_hook(rename)
    restored.register_load_state_dict_pre_hook(unwrap, prepend=True)
    restored.load_state_dict({"optimizer": old, "epoch": 3})
    assert order == ["unwrap", "rename"]
    train(model, optimizer, 2)
    train(twin, restored, 2)
    assert_same(model, twin)


@pytest.mark.parametrize("rule", RULES)
def test_what_a_post_hook_changes_counts(rule: str) -> None:
    model, twin = Language(), Language()
    optimizer, restored = made(rule, model), made(rule, twin)
    train(model, optimizer, 2)
    twin.load_state_dict(model.state_dict())

    def forget(own: Any) -> None:
        own.state.clear()
        for group in own.param_groups:
            group["lr"] = 5e-3

    restored.register_load_state_dict_post_hook(forget)
    restored.load_state_dict(optimizer.state_dict())
    fresh_model = copy.deepcopy(twin)
    fresh = made(rule, fresh_model)
    for group in fresh.param_groups:
        group["lr"] = 5e-3
    train(twin, restored, 2)
    train(fresh_model, fresh, 2)
    assert_same(twin, fresh_model)


# -------------------------------------------------------------------- groups and parameters


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "neurms"])
def test_groups_that_are_written_by_hand_are_as_added_ones(rule: str, named: bool) -> None:
    models, optimizers = [], []
    for by_hand in (False, True):
        model = Language()
        parts = [
            [p if named else p[1] for p in model.named_parameters() if p[0].startswith(own)]
            for own in (("attention", "head"), ("recurrent", "convolution"))
        ]
        optimizer = made(rule, parts[0])
        train(model, optimizer, 1)
        bare = [p[1] if isinstance(p, tuple) else p for p in parts[1]]
        if by_hand:
            # As Lightning's BaseFinetuning does it.
            optimizer.param_groups.append({"params": bare, "lr": 1e-3})
        else:
            optimizer.add_param_group({"params": parts[1], "lr": 1e-3})
        train(model, optimizer, 2)
        models.append(model)
        optimizers.append(optimizer)
    added, written = optimizers
    assert [row.rule for row in written.plan()] == [row.rule for row in added.plan()]
    draws = "seed" in added.default_settings()
    if not draws:
        assert_same(*models)
    written.load_state_dict(copy.deepcopy(written.state_dict()))
    train(models[1], written, 1)


@pytest.mark.parametrize("rule", RULES)
def test_parameters_that_take_the_place_of_others_go_on(rule: str) -> None:
    model, twin = Language(), Language()
    optimizer, other = made(rule, model), made(rule, twin)
    train(model, optimizer, 2)
    train(twin, other, 2)
    # As Accelerate puts sharded parameters in the place of those that were there.
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                setattr(module, name, nn.Parameter(parameter.detach().clone()))
    new = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [new[name] for name in group["param_names"]]
    train(model, optimizer, 3)
    train(twin, other, 3)
    assert_same(model, twin)
    assert {state["step"] for state in optimizer.state.values()} == {5}


# -------------------------------------------------------------------- graphs


@pytest.mark.parametrize("rule", ["neurms", "racs", "muon", "alice", "soap"])
@pytest.mark.parametrize("eager_first", [True, False])
def test_a_compiled_step_is_the_eager_one(rule: str, eager_first: bool) -> None:
    torch._dynamo.reset()
    model, twin = Language(), Language()
    optimizer, other = made(rule, model), made(rule, twin)
    compiled = torch.compile(optimizer.step, backend="eager")
    train(model, optimizer, 1, optimizer.step if eager_first else compiled)
    train(model, optimizer, 2, compiled)
    train(twin, other, 3)
    assert_same(model, twin)
    assert optimizer.state_bytes() == other.state_bytes() == other.plan().state_bytes


# Dynamo looks at .grad of whatever a graph takes in, and torch warns of that.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.slow
@pytest.mark.parametrize("rule", ["neurms", "racs", "soap"])
def test_a_compiled_training_step_is_the_eager_one(rule: str) -> None:
    torch._dynamo.reset()
    model, twin = Language(), Language()
    for one in (model, twin):
        # The keys' bias has a gradient of rounding noise alone, which AdamW makes whole steps of.
        one.attention.in_proj_bias.requires_grad_(False)
    optimizer, other = made(rule, model), made(rule, twin)

    @torch.compile(backend="aot_eager")
    def step() -> Tensor:
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        optimizer.step()
        return value

    for _ in range(3):
        step()
    train(twin, other, 3)
    assert_same(model, twin, atol=1e-5)
