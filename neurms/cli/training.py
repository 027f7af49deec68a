"""One method's training run in a plain loop, and what is measured in it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from neurms.cli.tasks import CURVE, Task
from neurms.core.ground.errors import NonFiniteError
from neurms.core.optimizers.plan import tensor_bytes

__all__ = ["Outcome", "fit", "step"]


@dataclass(frozen=True)
class Outcome:
    """What one training run gave.

    Args:
        figure: What the task ends with; NaN for a run that left the finite numbers.
        curve: (step, validation loss), up to where the run was finite.
        seconds: Wall time of the whole run, validation included.
        state_bytes: Bytes of the tensors in the optimizer's state after the last step.
    """

    figure: float
    curve: Sequence[tuple[int, float]]
    seconds: float
    state_bytes: int


def fit(
    make: Callable[[nn.Module], torch.optim.Optimizer],
    task: Task,
    seed: int,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> Outcome:
    """Train one network by one optimizer.

    Args:
        make: Returns the optimizer for a model.
        task: The network, its batches and what judges it; every run of a seed sees the same.
        seed: Of the first weights and the order of batches.
        report: Called after each step with the number of steps and the last validation loss.

    Returns:
        The run's figures.
    """
    start = time.perf_counter()
    model = task.model(seed)
    optimizer = make(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, task.rate)
    generator = torch.Generator().manual_seed(10_000 + seed)
    curve: list[tuple[int, float]] = []
    figure, loss = math.nan, math.nan
    for number in range(1, task.steps + 1):
        if not step(model, optimizer, task, generator):
            break
        schedule.step()
        if number % max(1, task.steps // CURVE) == 0:
            loss = task.judged(model, "validation")
            curve.append((number, loss))
        report(number, loss)
    else:
        figure = task.final(model)
    seconds = time.perf_counter() - start
    return Outcome(figure, curve, seconds, tensor_bytes(dict(optimizer.state)))


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, task: Task, generator: torch.Generator
) -> bool:
    """Go forward, backward and one step; False where a loss or gradient is not finite."""
    optimizer.zero_grad()
    loss = task.loss(model, generator)
    loss.backward()
    if not math.isfinite(loss.item()):
        return False
    try:
        optimizer.step()
    except NonFiniteError:
        return False
    return True
