"""What the demo compares: the methods and their settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from neurms.core.optimizers.registry import create
from neurms.core.optimizers.rmnp import RMNP

__all__ = ["Method", "methods"]


@dataclass(frozen=True)
class Method:
    """One line of the demo's table.

    Args:
        title: What the table calls it.
        optimizer: A name that :func:`neurms.create` knows.
        lr: Learning rate at the top of the schedule.
        settings: The optimizer's other settings.
        outside: Settings of AdamW for what other rules leave to their fallback; None for a rule
            that takes one rate, or has a fallback of its own.
    """

    title: str
    optimizer: str
    lr: float
    settings: Mapping[str, Any] = field(default_factory=dict)
    outside: Mapping[str, Any] | None = None

    def optimize(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer for a model."""
        if self.outside is None:
            return create(self.optimizer, model, lr=self.lr, **self.settings)
        hidden, rest = _divided(model)
        groups = [{"params": hidden}, {"params": rest, **self.outside}]
        return create(self.optimizer, groups, lr=self.lr, **self.settings)


def _divided(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the parameters that a rule takes, and those that it leaves to its fallback."""
    outside = {row.name for row in RMNP(model).plan() if row.rule == "fallback"}
    named = list(model.named_parameters())
    return [p for n, p in named if n not in outside], [p for n, p in named if n in outside]


# The best of {.0003, .001, .003, .01, .03, .1} by validation accuracy: the mean of three seeds for
# digits, one seed for MNIST, whose rates serve for Fashion-MNIST too.
_RATES = {
    "digits": {"SGD": 0.1, "AdamW": 0.003, "U": 0.03, "B": 0.01, "F": 0.01},
    "mnist": {"SGD": 0.1, "AdamW": 0.003, "U": 0.01, "B": 0.01, "F": 0.01},
}


def methods(data: str) -> tuple[Method, ...]:
    """Return the methods with their settings for a data set; the yardstick is first.

    Torch's optimizers run fused, their fastest form on a CPU, so that times compare with the best
    there is.

    Example:
        >>> [method.title for method in methods("digits")]
        ['SGD momentum .9', 'AdamW', 'NeuRMS-U', 'NeuRMS-B', 'NeuRMS-F']
    """
    if data == "manual":
        return _MANUAL
    rates = _RATES.get(data, _RATES["mnist"])
    return (
        Method("SGD momentum .9", "sgd", rates["SGD"], {"momentum": 0.9, "fused": True}),
        Method("AdamW", "adamw", rates["AdamW"], {"fused": True}),
        *(
            Method(f"NeuRMS-{variant}", "neurms", rates[variant], {"variant": variant})
            for variant in ("U", "B", "F")
        ),
    )


def _with_fallback(lr: float, momentum: float) -> dict[str, Any]:
    return {"fallback_lr": lr, "fallback_betas": (momentum, 0.95)}


# The same search for every row: `neurms bench contest --task demo`, whose chosen settings are in
# benchmarks/results/contests/demo.json.
_TORCH = {"fused": True, "weight_decay": 0.0}
_NORMALIZED = {"variant": "U", "normalize": "rms", "clip": "relative", "kappa": 10.0}
_AVERAGE = {"momentum": 0.8, "nesterov": True, "moments": "average"}
_MANUAL = (
    Method("AdamW", "adamw", 8e-3, {**_TORCH, "betas": (0.6, 0.8)}),
    Method(
        "AdamW, two rates",
        "adamw",
        8e-3,
        {**_TORCH, "betas": (0.5, 0.999)},
        outside={"lr": 0.032, "betas": (0.7, 0.95)},
    ),
    Method("SGD momentum", "sgd", 0.424, {"momentum": 0.9, "fused": True}),
    Method(
        "Muon", "muon", 0.08, {"momentum": 0.7, "weight_decay": 0.0, **_with_fallback(0.016, 0.7)}
    ),
    Method("RMNP", "rmnp", 0.02, {"momentum": 0.8, **_with_fallback(0.032, 0.7)}),
    Method("RACS", "racs", 0.16, {"beta": 0.8, **_with_fallback(0.064, 0.95)}),
    Method(
        "NeuRMS-P average",
        "neurms",
        2e-3,
        {"variant": "P", "head": "fallback", **_AVERAGE, **_with_fallback(0.032, 0.7)},
    ),
    Method(
        "NeuRMS-U normalized",
        "neurms",
        8e-3,
        {**_NORMALIZED, "beta": 0.95, **_with_fallback(0.032, 0.7)},
    ),
)
