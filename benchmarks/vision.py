"""What the image benchmarks share: the methods, a training run of so many steps, step times."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import neurms
from neurms.cli.data import Split
from neurms.core.ground.errors import NonFiniteError
from neurms.core.optimizers.plan import tensor_bytes

CHANCE = 0.1
WARMUP = 0.1
"""Share of the steps in which the learning rate rises; a cosine to zero follows."""
OTHERS_LR = 3e-3
"""AdamW's rate for the parameters outside a rule (heads, biases)."""


@dataclass(frozen=True)
class Method:
    """An optimizer with its settings.

    Args:
        rule: A name for ``neurms.create``.
        lr: Where the search for its learning rate starts.
        settings: Keyword arguments.
    """

    rule: str
    lr: float
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        """Whether it is a NeuRMS."""
        return self.rule == "neurms"

    def make(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        """Return the optimizer of a model."""
        settings = dict(self.settings)
        if self.rule in ("rmnp", "racs", "muon"):
            settings["fallback_lr"] = OTHERS_LR
        return neurms.create(self.rule, model, lr=lr, **settings)


_ALL = {"head": "rule"}
_BACKWARD = {"update": "backward"}
_BF16 = {"gemm": "bfloat16", **_BACKWARD}
_HEAD = {"head": "fallback", "fallback_lr": OTHERS_LR}

# NeuRMS with momentum in float32 is faster after the gradients than within backward.
METHODS: dict[str, Method] = {
    "SGD": Method("sgd", 0.3, {"fused": True}),
    "SGD-momentum": Method("sgd", 0.1, {"momentum": 0.9, "fused": True}),
    "RMSProp": Method("rmsprop", 1e-3, {"alpha": 0.99}),
    "Adam": Method("adam", 3e-3, {"fused": True}),
    "AdamW": Method("adamw", 3e-3, {"fused": True}),
    "Adafactor": Method("adafactor", 0.3),
    "LARS": Method("lars", 1e-2, {"trust_coefficient": 1.0, **_ALL}),
    "LAMB": Method("lamb", 1e-2, dict(_ALL)),
    "Shampoo": Method(
        "shampoo",
        3e-3,
        {
            "betas": (0.9, 0.999),
            "grafting": "adam",
            "interval": 20,
            "block_size": 256,
            "merge_dims": False,
            **_ALL,
        },
    ),
    "Muon": Method("muon", 2e-2),
    "RMNP": Method("rmnp", 2e-2),
    "RACS": Method("racs", 5e-2),
    "NeuRMS-U": Method("neurms", 2e-2, {"variant": "U", **_BACKWARD}),
    "NeuRMS-B": Method("neurms", 2e-2, {"variant": "B", **_BACKWARD}),
    "NeuRMS-F": Method("neurms", 2e-2, {"variant": "F", **_BACKWARD}),
    "NeuRMS-U-momentum": Method("neurms", 3e-3, {"variant": "U", "momentum": 0.9}),
    "NeuRMS-B-momentum": Method("neurms", 3e-3, {"variant": "B", "momentum": 0.9}),
    "NeuRMS-F-momentum": Method("neurms", 3e-3, {"variant": "F", "momentum": 0.9}),
    # The last layer goes to AdamW, as RMNP's, RACS's and Muon's does.
    "NeuRMS-U-head": Method("neurms", 1e-2, {"variant": "U", "momentum": 0.9, **_HEAD}),
    # The product of errors and inputs alone is in bfloat16; weights and velocity are float32.
    "NeuRMS-U-bf16": Method("neurms", 2e-2, {"variant": "U", **_BF16}),
    "NeuRMS-U-momentum-bf16": Method("neurms", 3e-3, {"variant": "U", "momentum": 0.9, **_BF16}),
    "NeuRMS-U-head-bf16": Method(
        "neurms", 1e-2, {"variant": "U", "momentum": 0.9, **_HEAD, **_BF16}
    ),
}


def perceptron(sizes: tuple[int, ...]) -> nn.Sequential:
    """Return linear layers of these sizes with ReLU between."""
    layers: list[nn.Module] = []
    for features, units in pairwise(sizes):
        layers += [nn.Linear(features, units), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Return a linear warmup over a tenth of the steps, then a cosine to zero."""
    warmup = max(1, round(WARMUP * steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def batches(count: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield indices of whole batches without end, in a new order each epoch."""
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count // batch * batch].split(batch)


def accuracy(model: nn.Module, split: Split) -> float:
    """Return the share of a split that a model classifies rightly."""
    model.eval()
    parts = zip(split.inputs.split(1000), split.labels.split(1000), strict=True)
    with torch.no_grad():
        hits = [(model(inputs).argmax(1) == labels).sum() for inputs, labels in parts]
    model.train()
    return float(sum(hits)) / len(split)


def train(
    network: Callable[[], nn.Module],
    make: Callable[[nn.Module], torch.optim.Optimizer],
    data: Split,
    evaluation: Split,
    *,
    steps: int,
    batch: int,
    seed: int,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
) -> dict[str, Any]:
    """Train a network for some steps.

    Args:
        network: Makes it, from the global generator seeded by ``seed``.
        make: Makes its optimizer.
        data: What it is trained on.
        evaluation: What its accuracy is measured on.
        steps: How many.
        batch: Examples in each.
        seed: Of the first weights and the order of examples.
        augment: Changes a batch's inputs.

    Returns:
        ``accuracy``; ``loss``, the mean over the last twentieth of the steps; ``steps``;
        ``state_bytes`` of the optimizer. A run that diverges has the accuracy of chance.
    """
    torch.manual_seed(seed)
    model = network()
    optimizer = make(model)
    plan = schedule(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    tail = torch.zeros(max(1, steps // 20))
    order = batches(len(data), batch, generator)
    try:
        for step in range(steps):
            index = next(order)
            inputs = data.inputs[index]
            if augment is not None:
                inputs = augment(inputs, generator)
            loss = cross_entropy(model(inputs), data.labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            plan.step()
            tail[step % len(tail)] = loss.detach()
    except NonFiniteError:
        tail.fill_(math.nan)
    finite = bool(torch.isfinite(tail).all())
    return {
        "accuracy": accuracy(model, evaluation) if finite else CHANCE,
        "loss": round(float(tail.mean()), 6) if finite else None,
        "steps": steps,
        "state_bytes": tensor_bytes(dict(optimizer.state)),
    }
