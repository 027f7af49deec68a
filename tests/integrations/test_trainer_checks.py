"""What a Trainer may not ask of NeuRMS is an error before anything moves."""

from typing import Any

import pytest
import torch
from torch import nn

import neurms

pytest.importorskip("lightning")

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
)
from lightning.pytorch.strategies import SingleDeviceStrategy

from neurms.callbacks import NeuRMSCallback
from tests.callbacks.lightning_runs import (
    Classifier,
    WithNeuRMS,
    assert_bit_equal,
    fitted,
    scaled,
    taps_of,
)


def test_a_fused_optimizer_keeps_its_scaled_gradients_from_a_velocity():
    class Fused(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), fused=True)

    with pytest.raises(MisconfigurationException, match=r"momentum=0\.9.*fused AdamW"):
        fitted(Fused(), NeuRMSCallback(momentum=0.9, variant="U"), **scaled())


@pytest.mark.parametrize(
    ("own", "given", "message"),
    [
        ({}, {"variant": "F"}, "variant='F'.*variant='U'"),
        ({"beta": 0.9}, {"beta": 0.95}, r"beta=0\.95.*beta=0\.9"),
        ({}, {"update": "backward"}, "update='backward'.*update='step'"),
        ({}, {"exclude": ("net.0",)}, r"exclude=\('net\.0',\).*exclude=\(\)"),
        ({}, {"heads": {"net.0.weight": 7}}, "heads="),
    ],
)
def test_settings_that_contradict_the_modules_neurms_are_an_error(own, given, message):
    with pytest.raises(MisconfigurationException, match=message):
        fitted(WithNeuRMS(**own), NeuRMSCallback(**{"variant": "U", **given}))


def test_settings_that_agree_are_not():
    fitted(
        WithNeuRMS(variant="F", exclude=["net.0"]), NeuRMSCallback(variant="F", exclude=("net.0",))
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: neurms.RACS(m), r"beside neurms\.RACS"),
        (lambda m: torch.optim.LBFGS(m.parameters()), "line search"),
        (lambda m: torch.optim.SGD(nn.Linear(2, 2).parameters()), "no optimizer of the module"),
    ],
)
def test_optimizers_that_must_not_be_preconditioned(make, message):
    class Given(Classifier):
        def configure_optimizers(self) -> Any:
            return make(self)

    module = Given()
    with pytest.raises(MisconfigurationException, match=message):
        fitted(module, NeuRMSCallback(variant="U"))
    assert taps_of(module) == 0


def test_a_model_without_layers_is_an_error():
    class Nothing(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.LayerNorm(5)

    with pytest.raises(ValueError, match="has no layer that neurms can tap"):
        fitted(Nothing(), NeuRMSCallback(variant="U"))


@pytest.mark.parametrize(
    ("module", "settings", "message"),
    [
        (Classifier, {"accumulate_grad_batches": 2}, "accumulate_grad_batches=2"),
        (Classifier, {"gradient_clip_val": 1.0}, r"gradient_clip_val=1\.0"),
        (Classifier, scaled(), "GradScaler"),
        (lambda: Classifier("adam"), {}, "its optimizer is Adam"),
        (lambda: WithNeuRMS(update="backward"), {"accumulate_grad_batches": 2}, "accumulate"),
        (Classifier, {"callbacks": GradientAccumulationScheduler({0: 1, 4: 2})}, "accumulate"),
    ],
)
def test_backward_updates_refuse_what_needs_gradients(module, settings, message):
    built, start = module(), Classifier()
    others = [settings.pop("callbacks")] if "callbacks" in settings else []
    with pytest.raises(MisconfigurationException, match=message):
        fitted(built, NeuRMSCallback(update="backward", variant="U"), *others, **settings)
    assert_bit_equal(built, start)
    assert taps_of(built) == 0


def test_backward_updates_refuse_clipping_by_the_module():
    class Clipping(Classifier):
        def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None: ...

    with pytest.raises(MisconfigurationException, match="configure_gradient_clipping"):
        fitted(Clipping(), NeuRMSCallback(update="backward", variant="U"))


def test_strategies_that_shard_are_refused(monkeypatch):
    monkeypatch.setattr("neurms.integrations.trainer_checks.FSDPStrategy", SingleDeviceStrategy)
    with pytest.raises(MisconfigurationException, match="flattens weights into pieces"):
        fitted(Classifier(), NeuRMSCallback(variant="U"))
