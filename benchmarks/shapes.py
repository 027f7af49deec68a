"""RMNP's preconditioning against Muon's, at the matrix shapes of GPT-2 and LLaMA.

For each model every distinct shape of a hidden matrix is measured once, both methods in turns; a
model's time is that of its matrices, each counted as often as it occurs.

    python -m benchmarks.shapes --threads 2          # a few minutes
    python -m benchmarks.shapes --only "GPT-2 124M"  # one model, resumable
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import neurms
from benchmarks.harness import RESULTS, Results

Shapes = dict[tuple[int, int], int]


def gpt2(width: int, layers: int) -> Shapes:
    """Return how often each hidden matrix occurs in a GPT-2."""
    return {
        (3 * width, width): layers,
        (width, width): layers,
        (4 * width, width): layers,
        (width, 4 * width): layers,
    }


def llama(width: int, hidden: int, layers: int) -> Shapes:
    """Return how often each hidden matrix occurs in a LLaMA."""
    return {(width, width): 4 * layers, (hidden, width): 2 * layers, (width, hidden): layers}


MODELS: dict[str, Shapes] = {
    "LLaMA 60M": llama(512, 1376, 8),
    "GPT-2 124M": gpt2(768, 12),
    "LLaMA 130M": llama(768, 2048, 12),
    "LLaMA 350M": llama(1024, 2736, 24),
    "GPT-2 355M": gpt2(1024, 24),
    "GPT-2 770M": gpt2(1280, 36),
    "LLaMA 1B": llama(2048, 5461, 24),
    "GPT-2 1.5B": gpt2(1600, 48),
}


def step_of(rule: str, shape: tuple[int, int]) -> Callable[[], float]:
    """Return what steps once on a fresh gradient and says how many seconds it took."""
    parameter = torch.nn.Parameter(0.02 * torch.randn(shape))
    optimizer = neurms.create(rule, [parameter], lr=1e-3)
    gradient: Tensor = torch.empty(shape)

    def timed() -> float:
        parameter.grad = gradient.normal_()
        start = time.perf_counter()
        optimizer.step()
        return time.perf_counter() - start

    return timed


def measured(shape: tuple[int, int], rounds: int) -> dict[str, float]:
    """Return the milliseconds of one step of each on a matrix, medians of interleaved rounds."""
    names = ["rmnp", "muon"]
    steps = {name: step_of(name, shape) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for name in names if number % 2 else names[::-1]:
            spent = steps[name]()
            if number:
                times[name].append(1e3 * spent)
    return {name: statistics.median(own) for name, own in times.items()}


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=",".join(MODELS), help="models, by comma")
    parser.add_argument("--out", type=Path, default=RESULTS / "shapes.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    models = {
        name: [[m, n, count] for (m, n), count in shapes.items()] for name, shapes in MODELS.items()
    }
    record = Results(
        arguments.out, {"threads": arguments.threads, "models": models, "dtype": "float32"}
    )
    for name in arguments.only.split(","):
        for m, n in MODELS[name]:
            record.run(f"{m}x{n}", partial(measured, (m, n), arguments.rounds))


if __name__ == "__main__":
    main()
