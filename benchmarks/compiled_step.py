"""A training step of a compiled ReLU MLP against the same with torch's fused SGD, and its graphs.

    neurms bench compiled_step --threads 2

The model is ``torch.compile(model)``; the step runs plainly. Then every network trains on with a
schedule and an evaluation after each tenth step, while graphs, breaks and recompilations are
counted: counts know no noise. A compilation takes half a minute, before the clock starts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import neurms
from benchmarks.harness import RESULTS, Results
from benchmarks.interleaved import Turn, interleaved, shown

SIZES, BATCH = (784, 1024, 1024, 10), 128
STEPS = 5
"""Counted steps of a turn; one before them is not counted."""
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd fused": ("sgd", {"fused": True}),
    "adamw fused": ("adamw", {"fused": True}),
    "NeuRMS-P": ("neurms", {"variant": "P"}),
    "NeuRMS-U": ("neurms", {"variant": "U"}),
    "NeuRMS-F": ("neurms", {"variant": "F"}),
    "RACS": ("racs", {"head": "rule"}),
    "RMNP": ("rmnp", {"head": "rule"}),
}


class Trained:
    """A compiled perceptron and its optimizer.

    Args:
        name: Of :data:`OPTIMIZERS`.
        sizes: Of the layers.
        batch: Examples in a step.
        backend: Of torch.compile.
    """

    def __init__(
        self,
        name: str,
        sizes: tuple[int, ...] = SIZES,
        batch: int = BATCH,
        backend: str = "inductor",
    ) -> None:
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for features, units in pairwise(sizes):
            layers += [nn.Linear(features, units), nn.ReLU()]
        model = _of_its_own_code()(*layers[:-1])
        kind, settings = OPTIMIZERS[name]
        self.optimizer = neurms.create(kind, model, lr=1e-3, **settings)
        self.model: Callable[[torch.Tensor], torch.Tensor] = torch.compile(model, backend=backend)
        self.sizes, self.batch = sizes, batch

    def data(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a fresh batch."""
        return torch.randn(self.batch, self.sizes[0]), torch.randint(self.sizes[-1], (self.batch,))

    def step(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Take one training step."""
        cross_entropy(self.model(inputs), targets).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def turn(self, number: int) -> Callable[[], None]:
        """Prepare a few steps to be timed."""
        first, *rest = [self.data() for _ in range(STEPS + 1)]
        self.step(*first)

        def steps() -> None:
            for inputs, targets in rest:
                self.step(inputs, targets)

        return steps


def _of_its_own_code() -> type[nn.Sequential]:
    """Return a class that shares no graphs: Dynamo keeps them by code, and looks at no hooks."""
    forward = nn.Sequential.forward
    code = forward.__code__.replace(co_name="forward")
    return type("Own", (nn.Sequential,), {"forward": FunctionType(code, forward.__globals__)})


def counted(trained: Trained, steps: int = 200) -> dict[str, int]:
    """Train with a schedule and evaluations; return graphs at first, breaks and recompilations.

    Args:
        trained: What trains.
        steps: Steps in which nothing may be compiled any more.
    """
    from torch._dynamo.utils import counters

    counters.clear()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(trained.optimizer, steps + 1)

    def go_on(count: int) -> None:
        for number in range(count):
            trained.step(*trained.data())
            schedule.step()
            if number % 10 == 0:
                with torch.no_grad():
                    trained.model(trained.data()[0])

    go_on(1)
    graphs = counters["stats"]["unique_graphs"]
    go_on(steps)
    return {
        "graphs": graphs,
        "breaks": sum(counters["graph_break"].values()),
        "recompilations": counters["stats"]["unique_graphs"] - graphs,
    }


def main() -> None:
    """Measure, count and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--only", nargs="*", choices=tuple(OPTIMIZERS), default=tuple(OPTIMIZERS))
    parser.add_argument("--out", type=Path, default=RESULTS / "compiled_step.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    # Dynamo counts the graphs of all contenders as one module's.
    torch._dynamo.config.recompile_limit = 4 * len(OPTIMIZERS)
    results = Results(given.out, {"sizes": SIZES, "batch": BATCH, "steps of a turn": STEPS})
    names = dict.fromkeys(("sgd fused", *given.only))
    counts, turns = {}, dict[str, Turn]()
    for name in names:
        trained = Trained(name)
        counts[name] = counted(trained)
        print(f"{name:24}{counts[name]}", flush=True)
        turns[name] = trained.turn
    found: dict[str, dict[str, Any]] = dict(interleaved(turns, "sgd fused", rounds=given.rounds))
    for row in found.values():
        row["ms"] /= STEPS
    print(shown(found))
    key = f"{'-'.join(map(str, SIZES))} batch {BATCH}, {given.threads} threads"
    results.runs[key] = {name: {**row, **counts[name]} for name, row in found.items()}
    results.save()


if __name__ == "__main__":
    main()
