"""What the demo compares: the methods, their learning rates, the network and the budget."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from neurms.core.optimizers.registry import create

__all__ = ["BUDGETS", "Budget", "Method", "methods", "perceptron"]


@dataclass(frozen=True)
class Budget:
    """How long and on what every method of a comparison trains.

    Args:
        epochs: Passes over the training part.
        batch: Examples in a batch.
        width: Units of each of the two hidden layers.
        validation: Examples held out.
        threads: Threads for torch, None for its own choice.
    """

    epochs: int
    batch: int
    width: int
    validation: int
    threads: int | None = None


@dataclass(frozen=True)
class Method:
    """One line of the demo's table.

    Args:
        title: What the table calls it.
        optimizer: A name that :func:`neurms.create` knows.
        lr: Learning rate at the start of the cosine schedule.
        settings: The optimizer's other settings.
    """

    title: str
    optimizer: str
    lr: float
    settings: Mapping[str, Any] = field(default_factory=dict)

    def optimize(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer for a model."""
        return create(self.optimizer, model, lr=self.lr, **self.settings)


BUDGETS = {
    # Products this small gain nothing from a second thread, and lose much on a busy machine.
    "digits": Budget(epochs=15, batch=64, width=256, validation=360, threads=1),
    "mnist": Budget(epochs=2, batch=128, width=512, validation=10_000),
    "fashion_mnist": Budget(epochs=2, batch=128, width=512, validation=10_000),
}

# The best of {.0003, .001, .003, .01, .03, .1} by validation accuracy within these budgets: the
# mean of three seeds for digits, one seed for MNIST, whose rates serve for Fashion-MNIST too.
_RATES = {
    "digits": {"SGD": 0.1, "AdamW": 0.003, "U": 0.03, "B": 0.01, "F": 0.01},
    "mnist": {"SGD": 0.1, "AdamW": 0.003, "U": 0.01, "B": 0.01, "F": 0.01},
}


def methods(data: str) -> tuple[Method, ...]:
    """Return the methods with their learning rates for a data set; SGD, the yardstick, is first.

    SGD and AdamW run fused, their fastest form on a CPU, so that times compare with the best there
    is. NeuRMS runs without momentum, the form that keeps m or m + n numbers for each layer.

    Example:
        >>> [method.title for method in methods("digits")]
        ['SGD momentum .9', 'AdamW', 'NeuRMS-U', 'NeuRMS-B', 'NeuRMS-F']
    """
    rates = _RATES.get(data, _RATES["mnist"])
    return (
        Method("SGD momentum .9", "sgd", rates["SGD"], {"momentum": 0.9, "fused": True}),
        Method("AdamW", "adamw", rates["AdamW"], {"fused": True}),
        *(
            Method(f"NeuRMS-{variant}", "neurms", rates[variant], {"variant": variant})
            for variant in ("U", "B", "F")
        ),
    )


def perceptron(features: int, width: int, classes: int = 10) -> nn.Sequential:
    """Return a multilayer perceptron features-width-width-classes with ReLU."""
    return nn.Sequential(
        OrderedDict(
            hidden1=nn.Linear(features, width),
            relu1=nn.ReLU(),
            hidden2=nn.Linear(width, width),
            relu2=nn.ReLU(),
            head=nn.Linear(width, classes),
        )
    )
