"""One method's training run under a Lightning Trainer, and what is measured in it."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from neurms.cli.data import Split
from neurms.cli.methods import Budget, Method, perceptron
from neurms.core.diagnostics.probe import FactorizationProbe
from neurms.core.optimizers.plan import tensor_bytes

__all__ = ["Outcome", "fit", "quiet_lightning"]

PROBED_STEPS = 50
"""On how many steps of a run rho is read; its moving averages follow every step."""


@dataclass(frozen=True)
class Outcome:
    """What one training run gave.

    Args:
        accuracy: Share of the validation part classified rightly after the last epoch.
        seconds: Wall time of the whole fit, validation and the rho probe included.
        state_bytes: Bytes of the tensors in the optimizer's state after the last step.
        rho: Layer -> mean over the probed steps.
    """

    accuracy: float
    seconds: float
    state_bytes: int
    rho: Mapping[str, float]


class Classifier(LightningModule):
    """A perceptron trained by one method with a cosine schedule."""

    def __init__(self, method: Method, features: int, width: int, steps: int) -> None:
        super().__init__()
        self.network = perceptron(features, width)
        self.method = method
        self.steps = steps
        self.accuracy = math.nan
        self._hits = 0
        self._seen = 0

    def configure_optimizers(self) -> Any:
        """Return the method's optimizer and a cosine schedule over all steps."""
        optimizer = self.method.optimize(self)
        schedule = CosineAnnealingLR(optimizer, self.steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        inputs, labels = batch
        return cross_entropy(self.network(inputs), labels)

    def on_validation_epoch_start(self) -> None:
        """Count anew."""
        self._hits = self._seen = 0

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count what the network classifies rightly."""
        inputs, labels = batch
        self._hits += int((self.network(inputs).argmax(1) == labels).sum())
        self._seen += len(labels)

    def on_validation_epoch_end(self) -> None:
        """Keep the epoch's accuracy."""
        self.accuracy = self._hits / self._seen


class RhoRecorder(Callback):
    """Reads the factorisation's faithfulness beside whatever optimizer the module has."""

    def __init__(self, steps: int) -> None:
        self._every = max(1, steps // PROBED_STEPS)
        self._probe: FactorizationProbe | None = None
        self._readings: list[dict[str, float]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Attach before the optimizer is made: variant B's errors are seen as it scales them."""
        network = pl_module.network
        assert isinstance(network, nn.Module)
        self._probe = FactorizationProbe(network).attach()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Read rho while the step's gradients are there."""
        if self._probe is not None and trainer.global_step % self._every == 0:
            self._readings.append(self._probe.rho())

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the probe off."""
        if self._probe is not None:
            self._probe.detach()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Take the probe off: Lightning calls no teardown after an exception."""
        self.teardown(trainer, pl_module, "fit")

    def means(self) -> dict[str, float]:
        """Return each layer's mean over the steps where rho is defined."""
        layers = self._readings[0] if self._readings else {}
        values = {
            layer: [r[layer] for r in self._readings if not math.isnan(r.get(layer, math.nan))]
            for layer in layers
        }
        return {layer: sum(v) / len(v) if v else math.nan for layer, v in values.items()}


class ProgressReporter(Callback):
    """Tells a progress display about each step and each epoch's accuracy."""

    def __init__(self, report: Callable[[int, float], None]) -> None:
        self._report = report

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report the step."""
        self._report(trainer.global_step, float(pl_module.accuracy))  # type: ignore[arg-type]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the last epoch's accuracy."""
        self._report(trainer.global_step, float(pl_module.accuracy))  # type: ignore[arg-type]


def fit(
    method: Method,
    train: Split,
    validation: Split,
    budget: Budget,
    seed: int,
    report: Callable[[int, float], None] = lambda step, accuracy: None,
) -> Outcome:
    """Train one network by one method.

    Args:
        method: The optimizer and its settings.
        train: What is trained on; every method sees the same batches in the same order.
        validation: What accuracy is measured on.
        budget: Epochs, batch and width.
        seed: Of the first weights and the order of batches.
        report: Called after each step with the number of steps and the last accuracy.

    Returns:
        The run's figures.

    Raises:
        KeyboardInterrupt: The training was interrupted.
    """
    torch.manual_seed(seed)
    steps = steps_of(budget, len(train))
    model = Classifier(method, train.inputs.shape[1], budget.width, steps)
    recorder = RhoRecorder(steps)
    with quiet_lightning():
        trainer = Trainer(
            max_epochs=budget.epochs,
            accelerator="cpu",
            callbacks=[recorder, ProgressReporter(report)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        start = time.perf_counter()
        trainer.fit(model, _batches(train, budget.batch, seed), _batches(validation, 1024))
        seconds = time.perf_counter() - start
    if trainer.interrupted:
        raise KeyboardInterrupt
    state = trainer.optimizers[0].state
    return Outcome(model.accuracy, seconds, tensor_bytes(dict(state)), recorder.means())


def steps_of(budget: Budget, examples: int) -> int:
    """Return the number of optimizer steps within a budget."""
    return budget.epochs * (examples // budget.batch)


def _batches(split: Split, size: int, seed: int | None = None) -> DataLoader[Any]:
    """Return whole batches by index, far quicker than collating examples; shuffled with a seed."""
    data = TensorDataset(split.inputs, split.labels)
    if seed is None:
        order: Any = range(len(split))
    else:
        order = RandomSampler(data, generator=torch.Generator().manual_seed(seed))
    sampler = BatchSampler(order, size, drop_last=seed is not None)
    return DataLoader(data, sampler=sampler, batch_size=None)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keep Lightning's announcements, tips and advice on workers out of a progress display."""
    names = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for message in (
                ".*does not have many workers",
                ".*number of training batches",
                ".*GPU available but not used",
                ".*treespec, LeafSpec",
            ):
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
