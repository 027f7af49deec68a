"""A whole training step (forward, backward, update) of a ReLU MLP, against torch's fused SGD.

    neurms bench step --threads 2
    neurms bench step --small      # a network that waits for Python, on one thread

Fresh data in every step, denormals flushed, medians of interleaved turns. A turn is a few steps and
one before them that is not counted: in training a step follows one of the same model, which has
left its weights in the caches and its memory to be used again.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import neurms
from benchmarks.harness import RESULTS, Results
from benchmarks.interleaved import Turn, interleaved, shown

CASES = (
    ((784, 1024, 1024, 10), 128),
    ((784, 1024, 1024, 10), 512),
    ((1024, 4096, 4096, 1024), 128),
)
SMALL = (((64, 256, 256, 10), 64),)
STEPS = 3
"""Counted steps of a turn."""
BACKWARD = {"update": "backward"}
ROUNDED = {**BACKWARD, "gemm": "bfloat16"}
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd fused": ("sgd", {"fused": True}),
    "sgd momentum fused": ("sgd", {"fused": True, "momentum": 0.9}),
    "adamw": ("adamw", {}),
    "adamw fused": ("adamw", {"fused": True}),
    "NeuRMS-P step": ("neurms", {"variant": "P"}),
    "NeuRMS-P momentum step": ("neurms", {"variant": "P", "momentum": 0.5}),
    "NeuRMS-P backward": ("neurms", {"variant": "P", **BACKWARD}),
    "NeuRMS-P momentum backward": ("neurms", {"variant": "P", "momentum": 0.5, **BACKWARD}),
    "NeuRMS-U step": ("neurms", {"variant": "U"}),
    "NeuRMS-F step": ("neurms", {"variant": "F"}),
    "NeuRMS-U momentum step": ("neurms", {"variant": "U", "momentum": 0.9}),
    "NeuRMS-U backward": ("neurms", {"variant": "U", **BACKWARD}),
    "NeuRMS-F backward": ("neurms", {"variant": "F", **BACKWARD}),
    "NeuRMS-U momentum backward": ("neurms", {"variant": "U", "momentum": 0.9, **BACKWARD}),
    "NeuRMS-U backward bf16": ("neurms", {"variant": "U", **ROUNDED}),
    "NeuRMS-F backward bf16": ("neurms", {"variant": "F", **ROUNDED}),
    "NeuRMS-U momentum backward bf16": ("neurms", {"variant": "U", "momentum": 0.9, **ROUNDED}),
    "RACS step": ("racs", {"head": "rule"}),
    "RACS sums step": ("racs", {"head": "rule", "fit": "sums"}),
    "RMNP step": ("rmnp", {"head": "rule", "nesterov": False}),
    "RMNP backward": ("rmnp", {"head": "rule", "nesterov": False, **BACKWARD}),
}
"""In the names, bf16 is NeuRMS's own product in bfloat16, all others being in float32."""
ALL_ROUNDED = ("sgd fused", "adamw fused", "NeuRMS-U momentum backward bf16")
"""Once more with the model's own products in bfloat16, too."""


@contextmanager
def rounded_products(rounded: bool) -> Iterator[None]:
    """Let torch multiply float32 matrices in bfloat16, or not."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if rounded else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def turn(name: str, sizes: tuple[int, ...], batch: int, rounded: bool = False) -> Turn:
    """Return a turn that takes steps of its own copy of the network.

    Args:
        name: Of :data:`OPTIMIZERS`.
        sizes: Of the layers.
        batch: Examples in a step.
        rounded: Whether the model's own products are in bfloat16.
    """
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for features, units in pairwise(sizes):
        layers += [nn.Linear(features, units), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    kind, settings = OPTIMIZERS[name]
    optimizer = neurms.create(kind, model, lr=1e-3, **settings)

    def step(inputs: torch.Tensor, targets: torch.Tensor) -> None:
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    def prepare(number: int) -> Any:
        data = [
            (torch.randn(batch, sizes[0]), torch.randint(sizes[-1], (batch,)))
            for _ in range(STEPS + 1)
        ]

        def steps() -> None:
            with rounded_products(rounded):
                for inputs, targets in data[1:]:
                    step(inputs, targets)

        with rounded_products(rounded):
            step(*data[0])
        return steps

    return prepare


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--small", action="store_true", help="the smallest network, on one thread")
    parser.add_argument("--only", nargs="*", choices=[*OPTIMIZERS], help="beside fused SGD")
    parser.add_argument("--out", type=Path, help="by default step.json or step_small.json")
    arguments = parser.parse_args()
    if arguments.small:
        arguments.threads = 1
    torch.set_num_threads(arguments.threads)
    path = arguments.out or RESULTS / ("step_small.json" if arguments.small else "step.json")
    results = Results(path, {"threads": arguments.threads, "steps of a turn": STEPS})
    for sizes, batch in SMALL if arguments.small else CASES:
        names = ["sgd fused", *arguments.only] if arguments.only else list(OPTIMIZERS)
        turns = {name: turn(name, sizes, batch) for name in dict.fromkeys(names)}
        for name in () if arguments.only else ALL_ROUNDED:
            turns[f"{name}, all in bf16"] = turn(name, sizes, batch, rounded=True)
        found = interleaved(turns, "sgd fused", rounds=arguments.rounds)
        for row in found.values():
            row["ms"] /= STEPS
        key = f"{'-'.join(map(str, sizes))} batch {batch}"
        print(f"{key}, {arguments.threads} threads\n{shown(found)}", flush=True)
        results.runs[key] = found
    results.save()


if __name__ == "__main__":
    main()
