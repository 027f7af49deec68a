"""Predicted bytes are measured bytes, and predicting touches nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from neurms import memory_report
from neurms.core.optimizers.plan import tensor_bytes
from neurms.core.optimizers.registry import available, create, is_torch
from tests.core.optimizers.training import SETTINGS, small_model, train


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", available())
def test_predicted_equals_measured(name: str, dtype: torch.dtype) -> None:
    model = small_model(dtype=dtype)
    settings = dict(SETTINGS.get(name, {}))
    if not is_torch(name):
        settings["low_precision"] = "master"
    report = memory_report(model, name, **settings)
    optimizer = create(name, model, **settings)
    train(model, optimizer, 2)
    measured = {n: tensor_bytes(optimizer.state[p]) for n, p in model.named_parameters()}
    assert {row.name: row.state_bytes for row in report} == measured
    assert report.state_bytes == sum(measured.values())


@pytest.mark.parametrize("name", available())
def test_the_model_is_left_alone(name: str) -> None:
    model = small_model()
    before = {key: (id(t), t.clone()) for key, t in model.state_dict(keep_vars=True).items()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    memory_report(model, name, **SETTINGS.get(name, {}))
    for key, tensor in model.state_dict(keep_vars=True).items():
        assert id(tensor) == before[key][0]
        assert torch.equal(tensor, before[key][1])
        assert tensor.grad is None
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


@pytest.mark.parametrize("name", ["racs", "neurms", "adam"])
def test_frozen_parameters_count_nothing(name: str) -> None:
    model = small_model()
    model[2].requires_grad_(False)
    rows = {row.name: row for row in memory_report(model, name)}
    assert rows["2.weight"].state_bytes == 0
    assert "frozen" in rows["2.weight"].reason
    assert rows["5.weight"].state_bytes > 0


def test_models_too_large_for_this_machine() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2**20, 2**20, bias=False), nn.Linear(2**20, 1, bias=False))
    assert memory_report(model, "racs", head="rule").state_bytes == 4 * (3 * 2**20 + 3)


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"must be an nn\.Module"):
        memory_report([torch.zeros(2, 2)], "racs")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rule='adamx' is not known"):
        memory_report(small_model(), "adamx")
    with pytest.raises(ValueError, match=r"beta=2\.0"):
        memory_report(small_model(), "racs", beta=2.0)
