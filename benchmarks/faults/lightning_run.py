"""A Lightning run that can be killed: it goes on from the newest checkpoint in its folder."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from benchmarks.faults.progress import Progress
from benchmarks.faults.recipes import AtomicCheckpointIO, RandomState, ResumableBatches
from neurms.callbacks import NeuRMSCallback
from neurms.integrations.lightning import optimizer_config

STEPS, EVERY = 30, 2
RUNS: dict[str, dict[str, Any]] = {
    "callback": {},
    "neurms": {"variant": "B", "momentum": 0.9},
    "neurms backward": {"update": "backward", "momentum": 0.9},
    "racs": {},
    "alice": {"rank": 8, "leading": 4, "interval": 4},
    "soap": {"interval": 3},
    "shared_basis": {"lr": 1e-2, "rank": 4},
    "rmnp": {"low_precision": "stochastic"},
}


class Network(LightningModule):
    """Two hidden layers with a norm and dropout, under one of :data:`RUNS`."""

    def __init__(self, run: str, progress: Progress) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.run, self.progress = run, progress
        self.net = nn.Sequential(
            nn.Linear(16, 64),
            nn.LayerNorm(64),
            nn.Dropout(0.1),
            nn.Linear(64, 64),
            nn.Tanh(),
            nn.Linear(64, 4),
        )
        if run == "rmnp":
            self.net.bfloat16()

    def training_step(self, batch: Any, index: int) -> Tensor:
        """Return the loss of one batch."""
        self.progress.now("forward", self.trainer.global_step)
        inputs = batch[0].to(next(self.net.parameters()).dtype)
        return cross_entropy(self.net(inputs).float(), batch[1])

    def configure_optimizers(self) -> Any:
        """Return the run's optimizer, with a schedule."""
        if self.run == "callback":
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        name, settings = self.run.split()[0], RUNS[self.run]
        return optimizer_config(self, name, schedule="cosine", warmup_steps=3, **settings)


class Phases(Callback):
    """Writes down which part of the step runs, for whoever kills the process."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Note the backward pass."""
        self.progress.now("backward", trainer.global_step)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any
    ) -> None:
        """Note the step."""
        self.progress.now("step", trainer.global_step)


class NotedCheckpointIO(AtomicCheckpointIO):
    """The recipe, with its time written down."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self.progress = progress

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        """Save."""
        self.progress.now("save", checkpoint["global_step"])
        super().save_checkpoint(checkpoint, path, storage_options)
        self.progress.now("between", checkpoint["global_step"])


def newest(folder: Path) -> Path | None:
    """Return the checkpoint to go on from; a partial file has another name."""
    found = sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    return found[-1] if found else None


def train(folder: Path, run: str, progress: Progress) -> dict[str, Any]:
    """Train to the end, from the newest checkpoint if there is one; return what is there then."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(
        torch.randn(56, 16, generator=generator), torch.randint(4, (56,), generator=generator)
    )
    module = Network(run, progress)
    random = RandomState()
    callbacks: list[Callback] = [
        random,
        Phases(progress),
        ModelCheckpoint(dirpath=folder, every_n_train_steps=EVERY, filename="{step}"),
    ]
    callbacks += [NeuRMSCallback(variant="F", log=False)] if run == "callback" else []
    trainer = Trainer(
        max_steps=STEPS,
        max_epochs=-1,
        accelerator="cpu",
        callbacks=callbacks,
        plugins=[NotedCheckpointIO(progress)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    torch.manual_seed(2)
    last = newest(folder)
    trainer.fit(
        module, ResumableBatches(data, 8), ckpt_path=last, weights_only=True if last else None
    )
    resumed = -1 if last is None else int(last.stem.split("=")[1])
    # A run that was complete draws nothing more.
    idle = resumed == STEPS
    return {
        "model": module.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "callbacks": [c.state_dict() for c in callbacks if isinstance(c, NeuRMSCallback)],
        "random": random.state if idle else torch.get_rng_state(),
        "resumed from": resumed,
    }
