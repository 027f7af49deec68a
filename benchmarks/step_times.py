"""Time of a whole training step of a perceptron by every method, side by side.

Batch taken from the data, forward, backward, update and schedule, as in training: the methods take
turns of twenty steps, so that a drift of the machine hits all alike and what is done only every
so many steps counts with its share. The budgets in seconds of ``neurms bench perceptrons`` become
steps by this file.

    neurms bench step_times --net 784-512-10 --threads 1
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import tyro
from torch.nn.functional import cross_entropy

from benchmarks.harness import RESULTS, Results
from benchmarks.interleaved import Turn, interleaved, shown
from benchmarks.vision import METHODS, batches, perceptron, schedule
from neurms import NeuRMS

TURN = 20


def turn(name: str, sizes: tuple[int, ...], batch: int) -> Turn:
    """Return a turn of twenty training steps of the method's own network."""
    torch.manual_seed(0)
    inputs, labels = torch.randn(10_000, sizes[0]), torch.randint(sizes[-1], (10_000,))
    model = perceptron(sizes)
    optimizer = METHODS[name].make(model, lr=1e-4)
    plan = schedule(optimizer, 1_000_000)
    order = batches(len(labels), batch, torch.Generator().manual_seed(0))

    def steps() -> None:
        for _ in range(TURN):
            index = next(order)
            loss = cross_entropy(model(inputs[index]), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            plan.step()

    def prepare(number: int) -> Any:
        return steps

    return prepare


def forward(trained: str | None, sizes: tuple[int, ...], batch: int, *, taps: bool) -> Turn:
    """Return a turn of a hundred forward passes, perhaps after some training steps.

    Args:
        trained: The method that trains first, or None.
        sizes: Of the layers.
        batch: Examples in a pass.
        taps: Whether NeuRMS's taps are still on.
    """
    torch.manual_seed(0)
    model, inputs = perceptron(sizes), torch.randn(batch, sizes[0])
    optimizer = None if trained is None else METHODS[trained].make(model, lr=1e-4)
    if isinstance(optimizer, NeuRMS):
        model(inputs).square().mean().backward()
        optimizer.step()
        if not taps:
            optimizer.detach()

    def prepare(number: int) -> Any:
        # The optimizer is held: its taps live as long as it does.
        return lambda held=optimizer: _passes(model, inputs)

    return prepare


def _passes(model: torch.nn.Module, inputs: torch.Tensor) -> None:
    with torch.no_grad():
        for _ in range(5 * TURN):
            model(inputs)


def inference(sizes: tuple[int, ...], batch: int, rounds: int) -> dict[str, Any]:
    """Return the time of a forward pass: as made, with taps, and once they are off."""
    turns = {
        "plain": forward(None, sizes, batch, taps=False),
        "tapped": forward("NeuRMS-U", sizes, batch, taps=True),
        "detached": forward("NeuRMS-U", sizes, batch, taps=False),
    }
    found = interleaved(turns, "plain", rounds=rounds)
    for row in found.values():
        row["ms"] = row["ms"] / (5 * TURN)
    return found


def main(
    net: str = "784-512-10",
    batch: int = 128,
    threads: int = 1,
    rounds: int = 8,
    methods: tuple[str, ...] = tuple(METHODS),
    out: Path = RESULTS / "step_times.json",
) -> None:
    """Measure the step times of a network.

    Args:
        net: Sizes of the layers.
        batch: Examples in a step.
        threads: Of torch.
        rounds: Counted turns of each method.
        methods: Which methods.
        out: Where the times are kept.
    """
    torch.set_num_threads(threads)
    results = Results(out, {"turn": TURN, "baseline": "AdamW"})
    sizes = tuple(map(int, net.split("-")))
    turns = {name: turn(name, sizes, batch) for name in methods}
    found = interleaved(turns, "AdamW", rounds=rounds, warmup=2)
    for row in found.values():
        row["ms"] = row["ms"] / TURN
    print(shown(found))
    # Methods measured in another run keep their ratio to that run's AdamW.
    results.runs.setdefault(f"{net} batch {batch} threads {threads}", {}).update(found)
    if threads == 1:
        # What a second is worth, kept when times are measured anew: see perceptrons.step_ms.
        results.runs.setdefault(f"{net} reference", {"ms": found["AdamW"]["ms"]})
        results.runs[f"{net} inference"] = inference(sizes, batch, rounds)
    results.save()


if __name__ == "__main__":
    tyro.cli(main)
