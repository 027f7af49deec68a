"""Python calls that an optimizer adds to a layer and a step: what small networks wait for.

    neurms bench calls

cProfile counts calls, those of built-in functions too, over steps of networks of 3 and 11 layers of
256 units; the difference is that of 8 layers, each a weight and a bias. What forward and backward
make without an optimizer is taken off; its own ``zero_grad`` counts. Counts know no noise.
"""

from __future__ import annotations

import argparse
import cProfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import neurms
from benchmarks.harness import RESULTS, Results

__all__ = ["OPTIMIZERS", "added_calls"]

SHALLOW, DEEP = 3, 11
WIDTH = 256
STEPS = 5

Make = Callable[[nn.Module], torch.optim.Optimizer]


def _ours(rule: str, **settings: Any) -> Make:
    # At a rate at which nothing leaves the finite numbers.
    return lambda model: neurms.create(rule, model, lr=1e-5, **settings)


OPTIMIZERS: dict[str, Make] = {
    "torch's SGD": lambda model: torch.optim.SGD(model.parameters(), lr=1e-5),
    "torch's AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-5),
    "RMNP": _ours("rmnp", head="rule"),
    "RMNP backward": _ours("rmnp", head="rule", nesterov=False, update="backward"),
    "RACS": _ours("racs", head="rule"),
    "NeuRMS-P": _ours("neurms", variant="P"),
    "NeuRMS-P average": _ours("neurms", momentum=0.8, nesterov=True, moments="average"),
    "NeuRMS-U": _ours("neurms", variant="U"),
    "NeuRMS-F": _ours("neurms", variant="F"),
    "NeuRMS-P backward": _ours("neurms", variant="P", update="backward"),
    "NeuRMS-U backward": _ours("neurms", variant="U", update="backward"),
    "Alice": _ours("alice", head="rule"),
    "Muon": _ours("muon", head="rule"),
}


def added_calls(make: Make) -> float:
    """Return the calls that an optimizer adds to each layer of a step, forward and backward too."""
    added = [_calls(depth, make) - _calls(depth, None) for depth in (DEEP, SHALLOW)]
    return (added[0] - added[1]) / (DEEP - SHALLOW) / STEPS


def _calls(depth: int, make: Make | None) -> int:
    """Return the calls of some steps of a network with so many hidden layers."""
    torch.manual_seed(0)
    hidden = [layer for _ in range(depth) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    model = nn.Sequential(*hidden, nn.Linear(WIDTH, 10))
    inputs, labels = torch.randn(32, WIDTH), torch.randint(0, 10, (32,))
    optimizer = None if make is None else make(model)
    parameters = list(model.parameters())

    def step() -> None:
        if optimizer is not None:
            optimizer.zero_grad()
        for parameter in parameters:
            parameter.grad = None
        cross_entropy(model(inputs), labels).backward()
        if optimizer is not None:
            optimizer.step()

    for _ in range(2):
        step()
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(STEPS):
        step()
    profile.disable()
    return sum(entry.callcount for entry in profile.getstats())


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "calls.json")
    arguments = parser.parse_args()
    settings = {"width": WIDTH, "layers": [SHALLOW, DEEP], "steps": STEPS}
    results = Results(arguments.out, settings)
    for name, make in OPTIMIZERS.items():
        results.runs[name] = {"calls": added_calls(make)}
        print(f"{name:20} {results.runs[name]['calls']:6.1f}")
    results.save()


if __name__ == "__main__":
    main()
