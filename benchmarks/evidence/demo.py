"""What ``neurms demo`` trains, as a comparison: its rates are found by everybody's search."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.evidence.design import NETWORK_SEEDS, Design
from neurms.cli.tasks import Manual
from neurms.cli.training import fit

__all__ = ["ROWS", "TASKS", "Demo"]

ROWS = (
    "AdamW",
    "AdamW, two rates",
    "SGD",
    "Muon",
    "RMNP",
    "RACS",
    "P average",
    "NeuRMS-U normalized",
)
"""The rows that the demo shows."""


class Demo:
    """The demo's language model."""

    def __init__(self) -> None:
        self.task = Manual()
        details = {
            "width": self.task.width,
            "layers": self.task.layers,
            "batch": self.task.batch,
            "context": self.task.context,
            "steps": self.task.steps,
            "schedule": "warmup of a tenth, cosine to 0",
        }
        self.design = Design(
            "demo", "loss, nats per byte", "lower", 0.02, 8, NETWORK_SEEDS, details
        )

    def train(
        self, make: Callable[[nn.Module], torch.optim.Optimizer], seed: int, *, reported: bool
    ) -> dict[str, Any]:
        """Train once; a run that leaves the finite numbers has the loss None."""
        found = fit(make, self.task, seed)
        if not reported:
            loss = found.curve[-1][1] if math.isfinite(found.figure) else None
            return {"validation": loss}
        loss = found.figure if math.isfinite(found.figure) else None
        return {"test": loss, "state_bytes": found.state_bytes}


TASKS = {"demo": Demo}
"""The task by name."""
