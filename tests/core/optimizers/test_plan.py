"""The plan reads like a table and adds up."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from neurms import RACS
from neurms.core.optimizers.plan import Plan, skeleton, tensor_bytes
from tests.core.optimizers.training import RULES, make, small_model, train


@pytest.mark.parametrize("name", RULES)
def test_predicted_bytes_are_measured_bytes(name: str) -> None:
    model = small_model()
    optimizer = make(name, model)
    plan = optimizer.plan()
    train(model, optimizer, 1)
    measured = [tensor_bytes(optimizer.state[p]) for p in model.parameters()]
    assert [row.state_bytes for row in plan] == measured
    assert plan.state_bytes == optimizer.state_bytes() == sum(measured)


def test_is_a_sequence() -> None:
    plan = RACS(small_model()).plan()
    assert len(plan) == 12
    assert plan[2].shape == (6, 16)
    assert isinstance(plan[:3], Plan)
    assert plan[:3].state_bytes == sum(row.state_bytes for row in list(plan)[:3])


def test_prints_every_parameter_and_the_total() -> None:
    text = str(RACS(nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 1))).plan())
    header, rule, *body, total = text.splitlines()
    assert header.split() == ["parameter", "module", "rule", "reason", "shape", "state", "bytes"]
    assert set(rule) == {"-", " "}
    assert " ".join(body[0].split()) == "0.weight Linear racs hidden linear layer 200x300 2,004"
    assert total.split() == ["total", "5,212"]
    assert {len(line) for line in text.splitlines()} == {len(header)}


def test_frozen_parameters_are_marked() -> None:
    model = small_model()
    model[5].weight.requires_grad_(False)
    row = next(r for r in RACS(model).plan() if r.name == "5.weight")
    assert (row.reason, row.state_bytes) == ("hidden linear layer (frozen)", 0)


def test_bytes_of_nested_state() -> None:
    state = {"a": torch.zeros(3), "b": [torch.zeros(2, dtype=torch.float64)], "step": 7}
    assert tensor_bytes(state) == 12 + 16


def test_skeletons_hold_no_storage_and_keep_ties() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    before = copy.deepcopy(model.state_dict())
    empty = skeleton(model)
    assert all(t.is_meta for t in [*empty.parameters(), *empty.buffers()])
    assert empty[2].weight is empty[0].weight  # type: ignore[index]
    assert [type(m) for m in empty.modules()] == [type(m) for m in model.modules()]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
