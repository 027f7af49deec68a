"""Images: part of the training images chooses, the set's own test images report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks import cifar, vision
from benchmarks.evidence.design import NETWORK_SEEDS, PERCEPTRON_SEEDS, Design
from neurms.cli.data import Split, hold_out, load

__all__ = ["TASKS", "Images", "Plan", "handwritten"]

Parts = Mapping[Literal["validation", "test"], tuple[Split, Split]]
Augment = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Plan:
    """A network, its data and how long it trains.

    Args:
        network: Makes it.
        parts: Returns, by the split that judges, what is trained on and what it is judged by.
        steps: Of every run, in searches too.
        batch: Examples in a step.
        augment: Changes a batch's inputs.
    """

    network: Callable[[], nn.Module]
    parts: Callable[[], Parts]
    steps: int
    batch: int
    augment: Augment | None = None


class Images:
    """A classifier for some steps.

    Args:
        name: Of the task.
        plan: What is trained.
        trials: Of every search.
        seeds: Of every row.
    """

    def __init__(self, name: str, plan: Plan, trials: int, seeds: tuple[int, ...]) -> None:
        self.plan = plan
        details = {
            "steps": plan.steps,
            "batch": plan.batch,
            "schedule": "warmup of a tenth, cosine to 0",
            "augmentation": None if plan.augment is None else "mirror",
        }
        self.design = Design(name, "accuracy", "higher", 0.002, trials, seeds, details)
        self._parts: Parts = {}

    def train(
        self, make: Callable[[nn.Module], torch.optim.Optimizer], seed: int, *, reported: bool
    ) -> dict[str, Any]:
        """Train once; a run that leaves the finite numbers has the accuracy None in a search."""
        self._parts = self._parts or self.plan.parts()
        part: Literal["validation", "test"] = "test" if reported else "validation"
        found = vision.train(
            self.plan.network,
            make,
            *self._parts[part],
            steps=self.plan.steps,
            batch=self.plan.batch,
            seed=seed,
            augment=self.plan.augment,
        )
        diverged = found["loss"] is None or not math.isfinite(found["loss"])
        judged = None if diverged and not reported else found["accuracy"]
        return {part: judged, "loss": found["loss"], "steps": found["steps"]} | (
            {"state_bytes": found["state_bytes"]} if reported else {}
        )


CHOOSING = 5_000
"""Training images that choose a convolutional network's settings."""


def handwritten(name: str) -> Parts:
    """Return flat images of 28 x 28 points, a sixth of the training images held out to choose."""
    data = load(name)
    if data.test is None:
        raise SystemExit(f"error: {name} has no test part; choose mnist or fashion_mnist")
    train = data.train
    return {"validation": hold_out(train, len(train) // 6, seed=0), "test": (train, data.test)}


def _clothes() -> Parts:
    data = load("fashion_mnist")
    if data.test is None:
        raise SystemExit("error: fashion_mnist has no test part")
    train, test = _squared(data.train), _squared(data.test)
    return {"validation": hold_out(train, CHOOSING, seed=0), "test": (train, test)}


def _squared(split: Split) -> Split:
    return Split(split.inputs.view(-1, 1, 28, 28), split.labels)


def _photographs() -> Parts:
    train, test = cifar.images("train", 50_000), cifar.images("test", 10_000)
    return {"validation": hold_out(train, CHOOSING, seed=0), "test": (train, test)}


MNIST = Plan(lambda: vision.perceptron((784, 512, 512, 10)), lambda: handwritten("mnist"), 936, 128)
CLOTHES = Plan(lambda: cifar.small(channels=1), _clothes, 300, 64)
RESNET = Plan(cifar.resnet20, _photographs, 300, 64, cifar.flip)

TASKS = {
    "mnist": lambda: Images("mnist", MNIST, 16, PERCEPTRON_SEEDS),
    "fashion-conv": lambda: Images("fashion-conv", CLOTHES, 16, NETWORK_SEEDS),
    "resnet20": lambda: Images("resnet20", RESNET, 8, NETWORK_SEEDS),
}
"""The tasks on images by name."""
