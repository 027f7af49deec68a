"""The time of one training step, several optimizers side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from neurms.cli.methods import Method
from neurms.cli.tasks import Task
from neurms.cli.training import step

__all__ = ["StepTime", "step_times"]


@dataclass(frozen=True)
class StepTime:
    """Median time of a step.

    Args:
        milliseconds: Median over all rounds.
        ratio: Median over rounds of the time against the first method's in the same round.
    """

    milliseconds: float
    ratio: float


def step_times(
    methods: Sequence[Method],
    task: Task,
    *,
    rounds: int = 12,
    steps: int = 4,
    report: Callable[[int], None] = lambda done: None,
) -> list[StepTime]:
    """Time batch, forward, backward and update of every method, interleaved.

    In each round every method takes a few steps in turn, so that another load on the machine weighs
    on all of them alike and cancels in the ratio; the order turns around from round to round.

    Args:
        methods: What to time; ratios are against the first.
        task: The network and its batches.
        rounds: How often the turn comes to each method.
        steps: Steps in a turn.
        report: Called with the number of rounds done.

    Returns:
        One entry for each method.
    """
    turns = [_turn(method, task, steps) for method in methods]
    for turn in turns:
        turn()
    samples: list[list[float]] = [[] for _ in turns]
    for done in range(1, rounds + 1):
        order = range(len(turns)) if done % 2 else range(len(turns) - 1, -1, -1)
        for index in order:
            samples[index].append(turns[index]())
        report(done)
    return [
        StepTime(
            1e3 * statistics.median(own),
            statistics.median(a / b for a, b in zip(own, samples[0], strict=True)),
        )
        for own in samples
    ]


def _turn(method: Method, task: Task, steps: int) -> Callable[[], float]:
    """Return a function that takes ``steps`` steps and returns the seconds of one."""
    model = task.model(0)
    optimizer = method.optimize(model)
    generator = torch.Generator().manual_seed(0)

    def turn() -> float:
        start = time.perf_counter()
        for _ in range(steps):
            step(model, optimizer, task, generator)
        return (time.perf_counter() - start) / steps

    return turn
