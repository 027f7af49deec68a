"""The time of one training step, several optimizers side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from neurms.cli.data import Split
from neurms.cli.methods import Budget, Method, perceptron

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
    train: Split,
    budget: Budget,
    *,
    rounds: int = 24,
    steps: int = 10,
    report: Callable[[int], None] = lambda done: None,
) -> list[StepTime]:
    """Time forward, backward and update of every method in a plain loop, interleaved.

    In each round every method takes a few steps in turn, so that another load on the machine weighs
    on all of them alike and cancels in the ratio; the order turns around from round to round.

    Args:
        methods: What to time; ratios are against the first.
        train: The first batch of it is used over and over.
        budget: Batch and width.
        rounds: How often the turn comes to each method.
        steps: Steps in a turn.
        report: Called with the number of rounds done.

    Returns:
        One entry for each method.
    """
    turns = [_turn(method, train, budget, steps) for method in methods]
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


def _turn(method: Method, train: Split, budget: Budget, steps: int) -> Callable[[], float]:
    """Return a function that takes ``steps`` steps and returns the seconds of one."""
    torch.manual_seed(0)
    model: nn.Module = perceptron(train.inputs.shape[1], budget.width)
    optimizer = method.optimize(model)
    inputs, labels = train.inputs[: budget.batch], train.labels[: budget.batch]

    def turn() -> float:
        start = time.perf_counter()
        for _ in range(steps):
            optimizer.zero_grad()
            cross_entropy(model(inputs), labels).backward()
            optimizer.step()
        return (time.perf_counter() - start) / steps

    return turn
