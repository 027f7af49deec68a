"""Tiny models, Trainers and reference loops for the tests of the Lightning callback."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import neurms

pytest.importorskip("lightning")

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision

from neurms.core.taps.hooks import HookTap

ROWS, BATCH = 24, 8


def data(batch: int = BATCH) -> DataLoader:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(ROWS, 5, generator=generator)
    return DataLoader(
        TensorDataset(inputs, torch.randint(0, 3, (ROWS,), generator=generator)), batch
    )


class Classifier(LightningModule):
    """A small network with a layer that the rule leaves alone, under any optimizer."""

    def __init__(self, optimizer: str = "sgd", lr: float = 0.05, momentum: float = 0.9) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Linear(7, 3))
        self.losses: list[Tensor] = []

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        return neurms.create(self.hparams.optimizer, self.parameters(), **self._settings())

    def _settings(self) -> dict[str, float]:
        own = {"lr": self.hparams.lr}
        return own | {"momentum": self.hparams.momentum} if self.hparams.optimizer == "sgd" else own


class Validated(Classifier):
    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    test_step = validation_step

    def predict_step(self, batch: Any, index: int) -> Tensor:
        return self.net(batch[0])


class WithNorm(Classifier):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.net = nn.Sequential(self.net[0], nn.LayerNorm(7), *self.net[1:])


class WithNeuRMS(Classifier):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = {"lr": 0.05, "variant": "U", "momentum": 0.9, **settings}

    def configure_optimizers(self) -> Any:
        return neurms.NeuRMS(self, **self.settings)


def trainer(*callbacks: Callback, **settings: Any) -> Trainer:
    quiet = {
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
    }
    limit = {} if "max_epochs" in settings else {"max_steps": 6}
    return Trainer(callbacks=list(callbacks), **{**quiet, **limit, **settings})


def fitted(module: LightningModule, *callbacks: Callback, batch: int = BATCH, **settings: Any):
    trainer(*callbacks, **settings).fit(module, data(batch))
    return module


def by_hand(steps: int = 6, batch: int = BATCH, clip: float = 0.0, **settings: Any) -> Classifier:
    """The same run with neurms.NeuRMS and without Lightning."""
    module = Classifier()
    settings = {"lr": 0.05, "variant": "U", "momentum": 0.9, **settings}
    optimizer = neurms.NeuRMS(module, **settings)
    batches = [b for _ in range(steps) for b in data(batch)][:steps]
    for inputs, labels in batches:
        F.cross_entropy(module.net(inputs), labels).backward()
        if clip:
            nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return module


def assert_same(first: nn.Module, second: nn.Module, tolerance: float = 1e-6) -> None:
    for (name, p), q in zip(first.named_parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(
            p, q, rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )


def assert_bit_equal(first: nn.Module, second: nn.Module) -> None:
    assert_same(first, second, tolerance=0.0)


def taps_of(model: nn.Module) -> int:
    hooks = sum(isinstance(h, HookTap) for m in model.modules() for h in m._forward_hooks.values())
    return hooks + sum(type(m).__name__ == "_TappedLinear" for m in model.modules())


class CountTaps(Callback):
    """Records how many taps there are whenever a batch starts."""

    def __init__(self) -> None:
        self.counts: set[int] = set()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.counts.add(taps_of(pl_module))


class Adversaries(LightningModule):
    """Two optimizers in manual optimization; the first loss reaches both networks."""

    automatic_optimization = False

    def __init__(self, set_to_none: bool = True) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.generator, self.critic = nn.Linear(5, 5), nn.Linear(5, 3)
        self.set_to_none = set_to_none

    def losses(self, batch: Any) -> tuple[Tensor, Tensor]:
        made = self.generator(batch[0])
        return F.cross_entropy(self.critic(made), batch[1]), F.cross_entropy(
            self.critic(made.detach().tanh()), batch[1].flip(0)
        )

    def training_step(self, batch: Any, index: int) -> None:
        for which, optimizer in enumerate(self.optimizers()):
            optimizer.zero_grad(set_to_none=self.set_to_none)
            self.manual_backward(self.losses(batch)[which])
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(m.parameters(), lr=0.1) for m in (self.generator, self.critic)]


def scaled(**scaler: Any) -> dict[str, Any]:
    """A CPU trainer's settings with the GradScaler that "16-mixed" has on accelerators."""
    made = torch.amp.GradScaler("cpu", **scaler)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=made)
    plugin.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)
    return {"plugins": plugin}
