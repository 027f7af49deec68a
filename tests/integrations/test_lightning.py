"""optimizer_config in real Trainers, against the schedules' formulas and torch's schedulers."""

import copy
import gc
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import neurms

pytest.importorskip("lightning")

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from neurms.callbacks import NeuRMSCallback
from neurms.integrations.lightning import WarmupDecay, optimizer_config
from tests.callbacks.lightning_runs import (
    Classifier,
    assert_bit_equal,
    assert_same,
    by_hand,
    data,
    fitted,
    scaled,
    taps_of,
    trainer,
)


class Configured(Classifier):
    """Classifier whose optimizer comes from optimizer_config."""

    def __init__(self, name: str = "racs", **settings: Any) -> None:
        super().__init__()
        self.name, self.settings = name, settings

    def configure_optimizers(self) -> Any:
        return optimizer_config(self, self.name, **self.settings)


class Rates(Callback):
    """Records the learning rate of every step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, module: Any, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


# ---------------------------------------------------------------- the schedule


def test_warmup_reaches_one_where_the_decay_starts():
    factor = WarmupDecay("cosine", warmup_steps=4, total_steps=14, min_lr_ratio=0.1)
    assert [factor(t) for t in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert factor(4) == 1.0
    assert factor(9) == pytest.approx(0.55)
    assert factor(14) == pytest.approx(0.1)
    assert factor(1000) == pytest.approx(0.1)


def test_shapes_without_warmup():
    assert [WarmupDecay("linear", 0, 4)(t) for t in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert [WarmupDecay("constant", 1)(t) for t in range(3)] == [0.5, 1.0, 1.0]


def test_cosine_is_torchs_linear_then_cosine():
    """Truth: LinearLR, then CosineAnnealingLR, in torch's SequentialLR."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    warmup = LinearLR(optimizer, start_factor=1 / 4, total_iters=3)
    cosine = CosineAnnealingLR(optimizer, T_max=7, eta_min=0.2)
    reference = SequentialLR(optimizer, [warmup, cosine], milestones=[3])
    factor = WarmupDecay("cosine", warmup_steps=3, total_steps=10, min_lr_ratio=0.2)
    for step in range(10):
        assert factor(step) == pytest.approx(optimizer.param_groups[0]["lr"]), step
        optimizer.step()
        reference.step()


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_schedule_advances_every_step_of_a_fit(schedule):
    rates, module = Rates(), Configured(lr=0.02, schedule=schedule, warmup_steps=2)
    fitted(module, rates, max_steps=6)
    factor = WarmupDecay(schedule, 2, 6)
    assert rates.rates == pytest.approx([0.02 * factor(step) for step in range(6)])


def test_steps_are_counted_over_epochs_and_accumulation():
    rates = Rates()
    fitted(
        Configured(lr=1e-3, schedule="linear"),
        rates,
        batch=4,
        max_epochs=2,
        accumulate_grad_batches=3,
    )
    assert rates.rates == pytest.approx([1e-3 * left for left in (1.0, 0.75, 0.5, 0.25)])


def test_the_config_is_lightnings():
    config = optimizer_config(Classifier(), "neurms", lr=0.1, schedule="constant", warmup_steps=3)
    assert isinstance(config["optimizer"], neurms.NeuRMS)
    assert config["lr_scheduler"]["interval"] == "step"
    assert config["lr_scheduler"]["name"] == "lr-neurms"
    assert optimizer_config(Classifier(), "adamw").keys() == {"optimizer"}


@pytest.mark.parametrize("name", ["neurms", "racs", "adamw"])
def test_names_make_the_optimizer_with_its_settings(name):
    module = Classifier()
    ours = optimizer_config(module, name, lr=0.03, weight_decay=0.01)["optimizer"]
    direct = neurms.create(name, copy.deepcopy(module), lr=0.03, weight_decay=0.01)
    assert type(ours) is type(direct)
    assert ours.defaults == direct.defaults


def test_part_of_a_module():
    module = Classifier()
    optimizer = optimizer_config(module, "racs", params=module.net[0])["optimizer"]
    assert [p for g in optimizer.param_groups for p in g["params"]] == list(
        module.net[0].parameters()
    )


@pytest.mark.parametrize("name", ["racs", "neurms"])
def test_a_resumed_run_is_bit_equal(tmp_path, name):
    settings = {"lr": 0.02, "schedule": "cosine", "warmup_steps": 2, "total_steps": 6}
    through = Configured(name, **settings)
    trainer(max_epochs=2).fit(through, data())
    first = trainer(max_epochs=1)
    first.fit(Configured(name, **settings), data())
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Configured(name, **settings)
    trainer(max_epochs=2).fit(resumed, data(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert_bit_equal(resumed, through)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"schedule": "cosinus"}, ValueError, "schedule='cosinus'"),
        ({"warmup_steps": 5}, ValueError, "warmup_steps=5 needs a schedule"),
        ({"schedule": "linear", "warmup_steps": -1}, ValueError, "warmup_steps=-1"),
        ({"schedule": "linear", "total_steps": 0}, ValueError, "total_steps=0"),
        ({"schedule": "linear", "total_steps": 9.5}, TypeError, r"total_steps=9\.5"),
        ({"schedule": "linear", "min_lr_ratio": 2.0}, ValueError, r"min_lr_ratio=2\.0"),
        (
            {"schedule": "cosine", "warmup_steps": 11, "total_steps": 10},
            ValueError,
            "warmup_steps=11 is longer than the run of total_steps=10",
        ),
        ({"schedule": "cosine"}, ValueError, "attached to none"),
        ({"learning_rate": 0.1}, TypeError, "learning_rate"),
    ],
)
def test_bad_schedules_and_settings(settings, error, message):
    with pytest.raises(error, match=message):
        optimizer_config(Classifier(), "racs", **settings)


def test_a_warmup_longer_than_the_trainers_run():
    with pytest.raises(ValueError, match="warmup_steps=7 is longer than the run of total_steps=6"):
        fitted(Configured(schedule="cosine", warmup_steps=7), max_steps=6)


def test_an_endless_run_needs_total_steps():
    with pytest.raises(ValueError, match="which is unlimited"):
        fitted(Configured(schedule="cosine"), max_epochs=-1)


def test_bad_names_and_modules():
    with pytest.raises(ValueError, match="name='sophia'"):
        optimizer_config(Classifier(), "sophia")
    with pytest.raises(TypeError, match="must be the LightningModule"):
        optimizer_config(nn.Linear(2, 2), "racs")


# ---------------------------------------------------------------- NeuRMS and its taps


NEURMS = {"lr": 0.05, "variant": "U", "momentum": 0.9}


@pytest.mark.parametrize("update", ["step", "backward"])
def test_two_fits_are_tapped_once_each(update):
    module = Configured("neurms", update=update, **NEURMS)
    fitted(module, max_epochs=1)
    second = copy.deepcopy(module)
    fitted(module, max_epochs=1)
    assert taps_of(module) == 2
    optimizer = neurms.NeuRMS(second, **NEURMS)
    for inputs, labels in data():
        F.cross_entropy(second.net(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same(module, second)


RMNP = {"lr": 0.05, "nesterov": False, "head": "rule"}


def test_momentum_takes_gradients_in_backward_and_parts_of_batches():
    module = Configured("rmnp", update="backward", **RMNP)
    fitted(module, max_epochs=1, accumulate_grad_batches=2)
    second = copy.deepcopy(module)
    assert taps_of(second) == 0
    twin = copy.deepcopy(module)
    fitted(module, max_epochs=1, accumulate_grad_batches=2)
    assert taps_of(module) == 2
    optimizer = neurms.RMNP(twin, **RMNP)
    batches = list(data())
    for start in range(0, len(batches), 2):
        window = batches[start : start + 2]
        for inputs, labels in window:
            (F.cross_entropy(twin.net(inputs), labels) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same(module, twin)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("lars", {"accumulate_grad_batches": 2}, "accumulate_grad_batches=2"),
        ("rmnp", {"gradient_clip_val": 1.0}, "gradient_clip_val"),
        ("muon", scaled(), "GradScaler"),
    ],
)
def test_momentum_in_backward_refuses_what_needs_gradients(name, settings, message):
    module = Configured(name, nesterov=False, update="backward")
    with pytest.raises(MisconfigurationException, match=message):
        fitted(module, **settings)
    assert taps_of(module) == 0


def test_taps_go_with_the_optimizer():
    module = Configured("neurms", **NEURMS)
    run = trainer()
    run.fit(module, data())
    del run
    module.trainer = None
    gc.collect()
    for inputs, _ in data():
        module.net(inputs)
    assert taps_of(module) == 0


def test_the_callback_takes_them_off():
    module = Configured("neurms", **NEURMS)
    fitted(module, NeuRMSCallback(variant="U"))
    assert taps_of(module) == 0
    assert_same(module, by_hand())


def test_a_grad_scalers_scale_is_divided_out_without_a_callback():
    module = Configured("neurms", **NEURMS)
    fitted(module, **scaled(init_scale=1024.0))
    assert_same(module, by_hand())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches=2"),
        ({"gradient_clip_val": 1.0}, "gradient_clip_val"),
        (scaled(), "GradScaler"),
    ],
)
def test_backward_updates_refuse_what_needs_gradients(settings, message):
    module = Configured("neurms", variant="U", update="backward")
    with pytest.raises(MisconfigurationException, match=message):
        fitted(module, **settings)
    assert taps_of(module) == 0


def test_two_networks_in_manual_optimization():
    class Two(LightningModule):
        automatic_optimization = False

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(5, 3), nn.Linear(5, 3)

        def training_step(self, batch: Any, index: int) -> None:
            for net, optimizer in zip((self.first, self.second), self.optimizers(), strict=True):
                optimizer.zero_grad()
                self.manual_backward(F.cross_entropy(net(batch[0]), batch[1]))
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [
                optimizer_config(self, "neurms", params=net, variant="U")["optimizer"]
                for net in (self.first, self.second)
            ]

    module = Two()
    fitted(module, max_epochs=1)
    assert taps_of(module) == 2


def test_math_is_the_docstrings():
    factor = WarmupDecay("cosine", 0, 8, 0.25)
    assert factor(2) == pytest.approx(0.25 + 0.75 * (1 + math.cos(math.pi / 4)) / 2)
