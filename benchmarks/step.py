"""A whole training step (forward, backward, update) of a ReLU MLP, against torch's fused SGD.

    neurms bench step --threads 2

Fresh data in every round, denormals flushed, medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
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
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd fused": ("sgd", {"fused": True}),
    "adamw": ("adamw", {}),
    "adamw fused": ("adamw", {"fused": True}),
    "NeuRMS-U step": ("neurms", {"variant": "U"}),
    "NeuRMS-F step": ("neurms", {"variant": "F"}),
    "NeuRMS-U backward": ("neurms", {"variant": "U", "update": "backward"}),
    "NeuRMS-F backward": ("neurms", {"variant": "F", "update": "backward"}),
}


def turn(name: str, sizes: tuple[int, ...], batch: int) -> Turn:
    """Return a turn that takes one step of its own copy of the network."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for features, units in pairwise(sizes):
        layers += [nn.Linear(features, units), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    kind, settings = OPTIMIZERS[name]
    optimizer = neurms.create(kind, model, lr=1e-3, **settings)

    def prepare(number: int) -> Any:
        inputs, targets = torch.randn(batch, sizes[0]), torch.randint(sizes[-1], (batch,))

        def step() -> None:
            cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    return prepare


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--out", type=Path, default=RESULTS / "step.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = Results(arguments.out, {"threads": arguments.threads})
    for sizes, batch in CASES:
        turns = {name: turn(name, sizes, batch) for name in OPTIMIZERS}
        found = interleaved(turns, "sgd fused", rounds=arguments.rounds)
        key = f"{'-'.join(map(str, sizes))} batch {batch}"
        print(f"{key}, {arguments.threads} threads\n{shown(found)}", flush=True)
        results.runs[key] = found
    results.save()


if __name__ == "__main__":
    main()
