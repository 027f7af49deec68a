"""A Keras run that can be killed: it goes on from the last complete file in its folder."""

from __future__ import annotations

import os

os.environ.setdefault("KERAS_BACKEND", "torch")

from pathlib import Path
from typing import Any

import keras
import numpy as np
import torch

from benchmarks.faults.keras_recipes import AtomicSave, SeedsByStep
from benchmarks.faults.progress import Progress
from neurms.integrations.keras import keras_optimizer

STEPS, EVERY = 30, 2
RUNS: dict[str, dict[str, Any]] = {
    "neurms": {"variant": "F", "momentum": 0.9},
    "neurms B": {"variant": "B"},
    "racs": {},
    "alice": {"rank": 8, "leading": 4, "interval": 4},
    "soap": {"interval": 3},
    "shared_basis": {"rank": 4},
    "rmnp": {},
}


class Batches(keras.utils.PyDataset):
    """The batches from ``start`` on: which batch a step sees depends on its number alone."""

    def __init__(self, start: int, progress: Progress) -> None:
        super().__init__()
        self.start, self.progress = start, progress

    def __len__(self) -> int:
        return STEPS - self.start

    def __getitem__(self, index: int) -> Any:
        step = self.start + index
        self.progress.now("forward", step)
        random = np.random.default_rng(step)
        return random.standard_normal((8, 16), "float32"), random.integers(0, 4, 8)


class NotedSave(AtomicSave):
    """The recipe, with its times written down."""

    def __init__(self, path: Path, progress: Progress) -> None:
        super().__init__(path, EVERY)
        self.progress = progress

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Save every few steps."""
        step = int(self.model.optimizer.iterations)
        self.progress.now("between" if step % EVERY else "save", step)
        super().on_train_batch_end(batch, logs)
        self.progress.now("between", step)


def compiled(run: str) -> Any:
    """Return a new model, compiled with the run's optimizer."""
    model = keras.Sequential(
        [
            keras.Input((16,)),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.LayerNormalization(),
            keras.layers.Dropout(0.1, seed=3),
            keras.layers.Dense(64, activation="tanh"),
            keras.layers.Dense(4),
        ]
    )
    schedule = keras.optimizers.schedules.CosineDecay(0.02, STEPS)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras_optimizer(run.split()[0], learning_rate=schedule, **RUNS[run])
    model.compile(optimizer=optimizer, loss=loss)
    return model


def train(folder: Path, run: str, progress: Progress) -> dict[str, Any]:
    """Train to the end, from the saved model if there is one; return everything at the end."""
    keras.utils.set_random_seed(0)
    path = folder / "last.keras"
    model = keras.models.load_model(path) if path.is_file() else compiled(run)
    start = int(model.optimizer.iterations) if path.is_file() else 0
    if start < STEPS:
        callbacks = [SeedsByStep(), NotedSave(path, progress)]
        model.fit(Batches(start, progress), verbose=0, shuffle=False, callbacks=callbacks)
    values = [torch.as_tensor(keras.ops.convert_to_numpy(v)) for v in model.weights]
    state = [torch.as_tensor(keras.ops.convert_to_numpy(v)) for v in model.optimizer.variables]
    return {"model": values, "optimizer": state, "resumed from": start or -1}
