"""What a run needs beside this library to be resumed bit for bit; shown in the guide."""

# The methods are hooks that Lightning and Keras describe.
# ruff: noqa: D102

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.utils.data import Dataset


class AtomicCheckpointIO(TorchCheckpointIO):
    """A checkpoint file is complete or it is not there, wherever temporary files live."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        with open(partial, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)


class RandomState(Callback):
    """Dropout continues where it was."""

    state = None

    def state_dict(self):
        return {"torch": torch.get_rng_state()}

    def load_state_dict(self, state_dict):
        self.state = state_dict["torch"]

    def on_train_start(self, trainer, pl_module):
        if self.state is not None:
            torch.set_rng_state(self.state)


class ResumableBatches:
    """Shuffled batches; Lightning keeps in the checkpoint how many were seen."""

    def __init__(self, dataset: Dataset[Any], batch_size: int, seed: int = 0) -> None:
        self.dataset, self.batch_size, self.seed, self.seen = dataset, batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.dataset) // self.batch_size

    def __iter__(self) -> Iterator[Any]:
        epoch, start = divmod(self.seen, len(self))
        order = torch.Generator().manual_seed(self.seed + epoch)
        rows = torch.randperm(len(self.dataset), generator=order).split(self.batch_size)
        for position in range(start, len(self)):
            self.seen += 1
            yield self.dataset[rows[position]]

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.seen}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.seen = state_dict["seen"]
