"""The rule of NeuRMSCallback in real Trainers, against neurms.NeuRMS in hand-written loops."""

import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("lightning")

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision

from neurms.callbacks import NeuRMSCallback
from neurms.core.ground.errors import NonFiniteError
from tests.callbacks.lightning_runs import (
    BATCH,
    Classifier,
    WithNorm,
    assert_bit_equal,
    assert_same,
    by_hand,
    data,
    fitted,
    scaled,
    taps_of,
)
from tests.core.unitwise.root_truth import inverse_root


# Beside P, SGD's momentum sums updates where NeuRMS's averages gradients.
@pytest.mark.parametrize(
    ("variant", "momentum"), [*itertools.product("UBF", [0.0, 0.9]), ("P", 0.0)]
)
def test_sgd_with_the_callback_is_neurms(variant, momentum):
    module = fitted(Classifier(momentum=momentum), NeuRMSCallback(variant=variant))
    assert_same(module, by_hand(variant=variant, momentum=momentum))
    assert taps_of(module) == 0


def test_every_setting_reaches_the_rule():
    settings = {
        "variant": "F",
        "beta": 0.5,
        "eps": 1e-4,
        "v_min": 1e-3,
        "s_min": 0.1,
        "s_max": 2.0,
        "c_min": 0.1,
        "c_max": 2.0,
        "bias_correction": False,
        "momentum": 0.8,
        "momentum_coupling": "gradient+velocity",
        "agc": 0.1,
        "loss_reduction": "sum",
        "heads": {"net.0.weight": 7},
        "weight_decay": 0.1,
        "head": "rule",
    }
    module = fitted(Classifier(momentum=0.0), NeuRMSCallback(**{"variant": "U", **settings}))
    assert_same(module, by_hand(**settings))


@pytest.mark.parametrize("name", ["adam", "rmsprop", "adamw"])
def test_other_optimizers_get_the_scaled_gradient(name):
    """Truth: the optimizer in a plain loop whose gradients are multiplied by S from autograd."""
    module = fitted(Classifier(name), NeuRMSCallback(beta=0.0, variant="U"), max_steps=3)
    reference = Classifier(name)
    optimizer = reference.configure_optimizers()
    for inputs, labels in data():
        errors = {}
        z = inputs
        for index, layer in enumerate(reference.net):
            z = layer(z)
            if isinstance(layer, nn.Linear):
                z.retain_grad()
                errors[index] = z
                z = z.clone()
        F.cross_entropy(z, labels).backward()
        for index, output in errors.items():
            s = inverse_root((BATCH * output.grad).square().mean(0)).clamp(max=100.0)
            reference.net[index].weight.grad *= s[:, None]
            reference.net[index].bias.grad *= s
        optimizer.step()
        optimizer.zero_grad()
    assert_same(module, reference)


def test_what_the_rule_leaves_alone_keeps_the_modules_optimizer():
    callback = NeuRMSCallback(exclude=("net.3",), variant="U")
    module = fitted(WithNorm(), callback, max_steps=1)
    plain = fitted(WithNorm(), max_steps=1)
    for name, parameter in plain.named_parameters():
        ours = dict(module.named_parameters())[name]
        assert torch.equal(parameter, ours) == (not name.startswith("net.0."))
    rules = {row.name: row.rule for row in callback.plan()}
    assert {name for name, rule in rules.items() if rule == "neurms"} == {
        "net.0.weight",
        "net.0.bias",
    }


def test_the_plan_is_announced_once(caplog):
    callback = NeuRMSCallback(variant="U")
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        for _ in range(2):
            fitted(WithNorm(), callback, max_steps=1)
    lines = [r.getMessage() for r in caplog.records if "NeuRMSCallback" in r.getMessage()]
    assert len(lines) == 1
    assert "SGD with 4 of 6 parameters preconditioned" in lines[0]


def test_no_plan_before_the_fit():
    with pytest.raises(RuntimeError, match="no plan before"):
        NeuRMSCallback(variant="U").plan()


@pytest.mark.parametrize("variant", ["U", "F"])
def test_accumulation_is_one_big_batch(variant):
    module = fitted(
        Classifier(),
        NeuRMSCallback(variant=variant),
        batch=4,
        accumulate_grad_batches=2,
        max_steps=3,
    )
    assert_same(module, by_hand(steps=3, variant=variant))


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_acts_on_the_preconditioned_gradient(algorithm):
    settings = {"gradient_clip_val": 0.1, "gradient_clip_algorithm": algorithm, "max_steps": 1}
    module, start = (
        fitted(Classifier(momentum=0.0), NeuRMSCallback(variant="U"), **settings),
        Classifier(),
    )
    moved = torch.cat(
        [
            (p - q).detach().flatten()
            for p, q in zip(module.parameters(), start.parameters(), strict=True)
        ]
    )
    size = moved.norm() if algorithm == "norm" else moved.abs().max()
    assert size == pytest.approx(0.05 * 0.1, rel=1e-3)
    unclipped = fitted(Classifier(momentum=0.0), NeuRMSCallback(variant="U"), max_steps=1)
    direction = torch.cat(
        [
            (p - q).detach().flatten()
            for p, q in zip(unclipped.parameters(), start.parameters(), strict=True)
        ]
    )
    if algorithm == "norm":
        torch.testing.assert_close(
            moved / moved.norm(), direction / direction.norm(), rtol=1e-3, atol=1e-4
        )


def test_bfloat16_autocast_is_close_to_full_precision():
    callback = NeuRMSCallback(variant="F")
    module = fitted(Classifier(), callback, precision="bf16-mixed")
    assert_same(module, by_hand(variant="F"), tolerance=0.05)
    assert all(s["v"].dtype == torch.float32 for s in callback.state_dict()["layers"].values())


def test_a_grad_scalers_scale_is_divided_out():
    callback = NeuRMSCallback(variant="F")
    module = fitted(Classifier(), callback, **scaled(init_scale=1024.0))
    assert_same(module, by_hand(variant="F"))


def test_half_precision_with_a_scaler_is_close_to_full_precision():
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=256.0))
    module = fitted(Classifier(), NeuRMSCallback(variant="U"), plugins=plugin)
    assert_same(module, by_hand(), tolerance=0.05)


class Overflow(Callback):
    """Makes the gradients of some steps infinite, after the GradScaler has scaled the loss."""

    def __init__(self, *steps: int, value: float = float("inf")) -> None:
        self.steps, self.value = steps, value

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx in self.steps:
            pl_module.net[0].bias.grad[0] = self.value


class Without(Classifier):
    """Leaves a batch out, as a skipped step should."""

    def training_step(self, batch: Any, index: int) -> Tensor | None:
        skipped = self.trainer.fit_loop.epoch_loop.total_batch_idx == 1
        return None if skipped else super().training_step(batch, index)


def test_an_overflow_commits_nothing():
    callback = NeuRMSCallback(variant="U")
    growth = {"init_scale": 64.0, "growth_interval": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        module = fitted(Classifier(), callback, Overflow(1), **scaled(**growth))
        reference = fitted(Without(), NeuRMSCallback(variant="U"), max_steps=-1, max_epochs=2)
    assert_same(module, reference)
    steps = {s["step"] for s in callback.state_dict()["layers"].values()}
    assert steps == {5}
    assert callback.state_dict()["skipped_steps"] == 1


def test_without_a_scaler_a_bad_gradient_stops_the_fit_before_anything_moves():
    module, start = Classifier(), Classifier()
    with pytest.raises(NonFiniteError, match=r"'net\.0\.bias'"):
        fitted(module, NeuRMSCallback(variant="U"), Overflow(0, value=float("nan")))
    assert_bit_equal(module, start)
    assert taps_of(module) == 0


def test_without_a_scaler_a_bad_step_can_be_skipped():
    callback = NeuRMSCallback(nonfinite="skip", variant="U")
    module = fitted(Classifier(), callback, Overflow(1, value=float("nan")))
    assert all(torch.isfinite(p).all() for p in module.parameters())
    assert {s["step"] for s in callback.state_dict()["layers"].values()} == {5}


def test_signature_has_every_setting_with_its_default():
    import inspect

    from neurms.core.unitwise.checks import default_settings

    parameters = inspect.signature(NeuRMSCallback).parameters
    given = {p.name: p.default for p in parameters.values() if p.name != "log"}
    assert given == default_settings()
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters.values())


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"variant": "G"}, ValueError, "variant='G'"),
        ({"beta": 1.5}, ValueError, r"beta=1\.5"),
        ({"exclude": "net"}, TypeError, "exclude='net'"),
        ({"update": "backward", "agc": 0.1}, ValueError, "agc"),
    ],
)
def test_bad_settings_are_refused_at_once(settings, error, message):
    with pytest.raises(error, match=message):
        NeuRMSCallback(**{"variant": "U", **settings})


CONFIG = """
trainer:
  max_steps: 6
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  callbacks:
    - class_path: neurms.callbacks.NeuRMSCallback
      init_args:
        variant: F
        s_max: 30.0
        exclude: [net.3]
model:
  lr: 0.05
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning:jsonargparse")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")
def test_lightning_cli_from_yaml(tmp_path, monkeypatch):
    pytest.importorskip("jsonargparse")
    monkeypatch.setattr("sys.argv", ["train"])
    from lightning.pytorch.cli import LightningCLI

    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    cli = LightningCLI(
        WithNorm,
        save_config_callback=None,
        seed_everything_default=False,
        args=["--config", str(config), "--trainer.callbacks.beta=0.95"],
        run=False,
    )
    callback = next(c for c in cli.trainer.callbacks if isinstance(c, NeuRMSCallback))
    assert callback.settings["variant"] == "F"
    assert callback.settings["s_max"] == 30.0
    assert callback.settings["beta"] == 0.95
    cli.trainer.fit(cli.model, data())
    assert set(callback.state_dict()["layers"]) == {"net.0.weight"}
