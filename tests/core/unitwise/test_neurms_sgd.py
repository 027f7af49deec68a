"""With all factors forced to 1, NeuRMS is torch.optim.SGD; schedulers of torch drive it alike."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from neurms import NeuRMS
from tests.core.unitwise.neurms_models import (
    CASES,
    assert_close_models,
    assert_same,
    batches,
    cross_entropy,
    mlp,
    train,
)

ONE = {"s_min": 1.0, "s_max": 1.0, "c_min": 1.0, "c_max": 1.0}


@pytest.mark.parametrize("update", ["step", "backward"])
@pytest.mark.parametrize("variant", ["U", "B", "F"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "momentum_coupling": "gradient+velocity"},
    ],
    ids=["plain", "momentum", "coupled"],
)
def test_factors_of_one_are_sgd(settings: dict[str, Any], variant: str, update: str) -> None:
    for case in ("mlp", "cnn", "transposed"):
        make, batch = CASES[case]
        ours, theirs = make(), make()
        optimizer = NeuRMS(ours, lr=0.1, variant=variant, update=update, **ONE, **settings)
        plain = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=settings.get("momentum", 0))
        data = [batch()] * 6
        train(ours, optimizer, data)
        train(theirs, plain, data)
        assert_close_models(theirs, ours, 2e-7 if update == "step" else 2e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_float64_is_sgd_to_rounding(momentum: float) -> None:
    ours, theirs = mlp().double(), mlp().double()
    data = [(x.double(), y) for x, y in batches(20)]
    train(ours, NeuRMS(ours, lr=0.1, momentum=momentum, variant="F", **ONE), data)
    train(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=momentum), data)
    assert_close_models(theirs, ours, 1e-14)


def test_decay_is_decoupled_and_spares_biases() -> None:
    ours, theirs = mlp().double(), mlp().double()
    data = [(x.double(), y) for x, y in batches(3)]
    train(ours, NeuRMS(ours, lr=0.1, weight_decay=0.2, **{"variant": "U", **ONE}), data)
    plain = torch.optim.SGD(theirs.parameters(), lr=0.1)
    for x, y in data:
        cross_entropy(theirs, x, y).backward()
        with torch.no_grad():
            for p in theirs.parameters():
                p.mul_(1 - 0.1 * 0.2 if p.ndim > 1 else 1.0)
        plain.step()
        plain.zero_grad()
    assert_close_models(theirs, ours, 1e-14)


SCHEDULES = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=5),
    "one-cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=10),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.7)],
        milestones=[3],
    ),
}


@pytest.mark.parametrize("update", ["step", "backward"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedulers_drive_it_as_they_drive_sgd(schedule: str, update: str) -> None:
    ours, theirs = mlp(), mlp()
    # OneCycleLR moves momentum, too.
    optimizer = NeuRMS(ours, lr=0.1, momentum=0.9, update=update, **{"variant": "U", **ONE})
    plain = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    schedulers = SCHEDULES[schedule](optimizer), SCHEDULES[schedule](plain)
    for batch in batches(8):
        train(ours, optimizer, [batch])
        train(theirs, plain, [batch])
        for scheduler in schedulers:
            scheduler.step()
        assert optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
        assert optimizer.param_groups[0]["momentum"] == plain.param_groups[0]["momentum"]
    assert_close_models(theirs, ours, 2e-6)


def test_reduce_on_plateau() -> None:
    model = mlp()
    optimizer = NeuRMS(model, lr=0.1, variant="U")
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    train(model, optimizer, batches(1))
    for loss in (1.0, 2.0, 3.0):
        scheduler.step(loss)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)


@pytest.mark.parametrize("update", ["step", "backward"])
def test_momentum_may_be_switched_on_and_off_in_training(update: str) -> None:
    model, fresh = mlp(), mlp()
    optimizer = NeuRMS(model, lr=0.1, update=update, **{"variant": "U", **ONE})
    plain = torch.optim.SGD(fresh.parameters(), lr=0.1)
    for number, batch in enumerate(batches(6)):
        momentum = 0.9 if 2 <= number < 4 else 0.0
        for o in (optimizer, plain):
            o.param_groups[0]["momentum"] = momentum
        train(model, optimizer, [batch])
        train(fresh, plain, [batch])
    assert_close_models(fresh, model, 2e-6)
    # What was switched on and off is in the checkpoint, and the checkpoint is loadable.
    saved = copy.deepcopy(optimizer.state_dict())
    other = NeuRMS(mlp(), lr=0.1, update=update, **{"variant": "U", **ONE})
    other.load_state_dict(saved)
    assert_same(other.state_dict()["state"], saved["state"])


def test_it_is_an_optimizer() -> None:
    model = mlp()
    optimizer = NeuRMS(model, variant="U")
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.defaults["lr"] == 1e-2
    names = optimizer.param_groups[0]["param_names"]
    assert names == [name for name, _ in model.named_parameters()]
