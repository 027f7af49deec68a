"""Checkpoints restore exactly, or are refused before anything has changed."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from neurms import RACS, RMNP
from neurms.core.ground.errors import CheckpointError
from tests.core.optimizers.training import RULES, assert_same_state, make, small_model, train


def trained(name: str = "rmnp", **settings: Any) -> tuple[nn.Sequential, Any]:
    model = small_model()
    optimizer = make(name, model, **settings)
    train(model, optimizer, 2)
    return model, optimizer


def through_a_file(state: Any, **settings: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True, **settings)


@pytest.mark.parametrize("name", RULES)
def test_holds_tensors_and_plain_values_only(name: str) -> None:
    _, optimizer = trained(name)
    assert_same_state(through_a_file(optimizer.state_dict()), optimizer.state_dict())
    for state in optimizer.state_dict()["state"].values():
        assert all(type(value) in (int, float, torch.Tensor) for value in state.values())


def test_map_location() -> None:
    model, optimizer = trained()
    loaded = through_a_file(optimizer.state_dict(), map_location="cpu")
    fresh = make("rmnp", copy.deepcopy(model))
    fresh.load_state_dict(loaded)
    assert_same_state(fresh.state_dict(), optimizer.state_dict())


def test_state_goes_to_the_parameters_device() -> None:
    """The meta device stands in for an accelerator."""
    _, optimizer = trained()
    with torch.device("meta"):
        fresh = make("rmnp", small_model())
    fresh.load_state_dict(optimizer.state_dict())
    for state in fresh.state.values():
        assert all(v.is_meta for v in state.values() if isinstance(v, torch.Tensor))


def test_the_checkpoint_is_copied() -> None:
    model, optimizer = trained()
    fresh = make("rmnp", copy.deepcopy(model))
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    fresh.load_state_dict(saved)
    for state in fresh.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                value.add_(1.0)
    assert_same_state(saved, kept)


def grouped(model: nn.Module, order: Callable[[list[Any]], list[Any]]) -> RMNP:
    named = list(model.named_parameters())
    halves = [named[:5], named[5:]]
    groups = [
        {"params": order(half), "lr": 0.1 * (i + 1), "momentum": 0.5 + 0.1 * i}
        for i, half in enumerate(halves)
    ]
    return RMNP(order(groups))


def test_reordered_groups_are_matched_by_name() -> None:
    model, twin = small_model(), small_model()
    saved = grouped(model, lambda x: x)
    train(model, saved, 2)
    twin.load_state_dict(model.state_dict())
    reordered = grouped(twin, lambda x: x[::-1])
    reordered.load_state_dict(through_a_file(saved.state_dict()))
    assert [g["lr"] for g in reordered.param_groups] == [0.2, 0.1]
    for m, o in ((model, saved), (twin, reordered)):
        train(m, o, range(2, 4))
    assert_same_state(dict(model.state_dict()), dict(twin.state_dict()))


def test_names_that_two_models_share_are_matched_by_position() -> None:
    def pair() -> tuple[list[nn.Linear], RMNP]:
        layers = [nn.Linear(3, 4), nn.Linear(3, 4)]
        return layers, RMNP([{"params": layer.named_parameters()} for layer in layers])

    layers, optimizer = pair()
    for layer in layers:
        layer(torch.randn(2, 3)).square().sum().backward()
    optimizer.step()
    twins, fresh = pair()
    fresh.load_state_dict(optimizer.state_dict())
    for layer, twin in zip(layers, twins, strict=True):
        assert_same_state(dict(optimizer.state[layer.weight]), dict(fresh.state[twin.weight]))


def test_a_schedulers_own_entries_are_no_obstacle() -> None:
    model, optimizer = trained()
    fresh = make("rmnp", copy.deepcopy(model))
    torch.optim.lr_scheduler.CosineAnnealingLR(fresh, T_max=5)
    fresh.load_state_dict(optimizer.state_dict())
    torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)
    make("rmnp", copy.deepcopy(model)).load_state_dict(optimizer.state_dict())


def test_one_optimizer_loads_more_than_once() -> None:
    """Torch adds to an optimizer's defaults when it loads; Accelerate loads before training."""
    _, source = trained()
    optimizer = make("rmnp", small_model())
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(source.state_dict())
    assert_same_state(optimizer.state_dict()["state"], source.state_dict()["state"])


def test_what_an_earlier_release_did_not_know_is_what_held_then() -> None:
    _, optimizer = trained("racs")
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group["fit"], group["maximize"]
    other = make("racs", small_model(), fit="sums")
    other.load_state_dict(saved)
    assert other.param_groups[0]["fit"] == "power"
    assert_same_state(other.state_dict(), optimizer.state_dict())


def test_settings_come_from_the_checkpoint() -> None:
    """As in torch.optim: what was saved was made with them."""
    model, optimizer = trained(momentum=0.0, lr=0.3)
    fresh = make("rmnp", copy.deepcopy(model), momentum=0.9)
    fresh.load_state_dict(optimizer.state_dict())
    assert_same_state(fresh.state_dict(), optimizer.state_dict())
    assert fresh.param_groups[0]["momentum"] == 0.0
    train(model, fresh, 1)


def without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda saved: {k: v for k, v in saved.items() if k != key}


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    def apply(saved: dict[str, Any]) -> Any:
        saved = copy.deepcopy(saved)
        change(saved)
        return saved

    return apply


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no state": (without("state"), "must hold 'state'"),
    "no groups": (without("param_groups"), "must hold 'state'"),
    "no dictionary": (lambda saved: [saved], "must hold 'state'"),
    "groups cut": (edited(lambda s: s["param_groups"].clear()), "no parameter group lists"),
    "group cut": (edited(lambda s: s["param_groups"][0].pop("params")), "damaged"),
    "names cut": (edited(lambda s: s["param_groups"][0]["param_names"].pop()), "damaged"),
    "setting cut": (
        edited(lambda s: s["param_groups"][0].pop("momentum")),
        r"lacks \['momentum'\]",
    ),
    "setting bad": (
        edited(lambda s: s["param_groups"][0].update(momentum=7.0)),
        r"settings make no optimizer: momentum=7\.0",
    ),
    "parameter's state cut": (
        edited(lambda s: s["state"][2].pop("momentum")),
        r"differs in \['mom",
    ),
    "parameter's state no dictionary": (edited(lambda s: s["state"].update({2: 1})), "damaged"),
    "stray state": (edited(lambda s: s["state"].update({99: {}})), "no parameter group lists"),
    "other shape": (
        edited(lambda s: s["state"][2].update(momentum=torch.zeros(2, 2))),
        r"'momentum' of '2\.weight' is a tensor of shape \(2, 2\)",
    ),
    "other dtype": (
        edited(lambda s: s["state"][2].update(momentum=s["state"][2]["momentum"].double())),
        "dtype torch.float64, expected",
    ),
    "other kind of step": (
        edited(lambda s: s["state"][2].update(step=torch.tensor(2.0))),
        "expected of type int",
    ),
    "other name": (
        edited(lambda s: s["param_groups"][0]["param_names"].__setitem__(0, "x")),
        r"another model: \['0\.weight', 'x'\]",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_and_changes_nothing(damage: str) -> None:
    change, message = DAMAGE[damage]
    _, optimizer = trained()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(CheckpointError, match=message):
        optimizer.load_state_dict(change(copy.deepcopy(before)))
    assert_same_state(optimizer.state_dict(), before)


def other_sizes() -> Any:
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3), nn.Linear(3, 2))
    optimizer = RMNP(model)
    model(torch.randn(2, 7)).sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: trained("racs")[1], "saved by 'racs', this group is 'rmnp'"),
        (other_sizes, "another model"),
        (lambda: torch.optim.AdamW(small_model().parameters()), "groups|lacks"),
        (lambda: trained(head="rule")[1], "differs in"),
    ],
)
def test_checkpoints_of_others_are_refused(other: Callable[[], Any], message: str) -> None:
    foreign = other().state_dict()
    _, optimizer = trained()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(CheckpointError, match=message):
        optimizer.load_state_dict(foreign)
    assert_same_state(optimizer.state_dict(), before)


def test_groups_that_were_split_differently_are_refused() -> None:
    model = small_model()
    split = grouped(model, lambda x: x)
    train(model, split, 1)
    with pytest.raises(CheckpointError, match="different settings for parameters that one group"):
        RMNP(model.named_parameters()).load_state_dict(split.state_dict())


def test_unnamed_groups_of_other_sizes_are_refused() -> None:
    first = RACS([nn.Parameter(torch.zeros(2, 2))])
    second = RACS([nn.Parameter(torch.zeros(2, 2)) for _ in range(2)])
    with pytest.raises(CheckpointError, match=r"groups of \[1\] parameters, this opt"):
        second.load_state_dict(first.state_dict())
