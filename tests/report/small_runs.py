"""Short profiled trainings for the tests of their reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import neurms
from neurms.callbacks.profiler import Profiler
from tests.callbacks.profiler import truth


def run(
    output: Path | None = None,
    steps: int = 6,
    variant: str = "F",
    loss: bool = False,
    **settings: Any,
) -> Profiler:
    model = truth.mlp()
    optimizer = neurms.NeuRMS(model, variant=variant)  # type: ignore[arg-type]
    common = {"every_n_steps": 1, "warmup_steps": 1, "output": output}
    profiler = Profiler(model, optimizer, **(common | settings))
    with profiler:
        for _ in range(steps):
            error = nn.functional.cross_entropy(model(torch.randn(8, 12)), torch.randint(4, (8,)))
            error.backward()
            if loss:
                profiler.log(train_loss=error)
            optimizer.step()
            optimizer.zero_grad()
    return profiler
