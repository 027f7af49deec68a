"""A whole training step of a comparison's rows, side by side in one process.

Batch, forward, backward, update and schedule, as in training; the rows take turns of ten steps, so
that a drift of the machine hits all alike. On text each row has the settings that its search chose,
and the chart on the first page turns steps into seconds by this file. On perceptrons it has those
that its search begins at, and the comparisons at equal time turn seconds into steps.

    neurms bench contest_step --task text-64
    neurms bench contest_step --task perceptrons
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch.nn.functional import cross_entropy

from benchmarks.evidence import entrants, perceptrons
from benchmarks.evidence.ledger import Row, rows
from benchmarks.harness import RESULTS, Results
from benchmarks.interleaved import Turn, interleaved, shown
from benchmarks.language import Scale, batch_of, loss_of
from benchmarks.vision import batches, perceptron, schedule

TASK: Literal["text-64"] = "text-64"
ROWS = ("AdamW", "AdamW, two rates", "RACS", "P", "P momentum", "P average")
TURN = 10
EXAMPLES = 10_000


def turn(optimizer: torch.optim.Optimizer, gradients: Callable[[], None]) -> Turn:
    """Return a turn of ten training steps.

    Args:
        optimizer: Of a model of its own.
        gradients: Takes a batch and goes forward and backward.
    """
    plan = schedule(optimizer, 1_000_000)

    def steps() -> None:
        for _ in range(TURN):
            optimizer.zero_grad()
            gradients()
            optimizer.step()
            plan.step()

    def prepare(number: int) -> Any:
        return steps

    return prepare


def on_text(row: Row, scale: Scale) -> Turn:
    """Return a row's turn on random bytes."""
    model = scale.model(0)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(256, (100_000,), generator=generator, dtype=torch.uint8)

    def gradients() -> None:
        loss_of(model, *batch_of(tokens, generator, scale)).backward()

    return turn(entrants.text()[row.name].make(model, dict(row.chosen)), gradients)


def on_digits(entrant: entrants.Entrant, sizes: tuple[int, ...]) -> Turn:
    """Return a row's turn on random images."""
    torch.manual_seed(0)
    inputs, labels = torch.randn(EXAMPLES, sizes[0]), torch.randint(sizes[-1], (EXAMPLES,))
    model = perceptron(sizes)
    order = batches(EXAMPLES, perceptrons.BATCH, torch.Generator().manual_seed(0))

    def gradients() -> None:
        index = next(order)
        cross_entropy(model(inputs[index]), labels[index]).backward()

    # A rate at which nothing leaves the finite numbers, however many steps there are.
    values = {**entrant.space.values(entrant.space.origin), "lr": 1e-5}
    return turn(entrant.make(model, values), gradients)


def text(names: tuple[str, ...]) -> dict[str, Turn]:
    """Return the turns of the text comparison's complete rows."""
    content = json.loads((RESULTS / "contests" / f"{TASK}.json").read_text())
    found = {row.name: row for row in rows(content) if row.complete and row.name in names}
    details = content["settings"]["design"]["details"]
    scale = Scale(**{name: details[name] for name in Scale.__dataclass_fields__})
    return {name: on_text(row, scale) for name, row in found.items()}


def digits(sizes: tuple[int, ...]) -> dict[str, Turn]:
    """Return the turns of all rows on a perceptron."""
    return {name: on_digits(entrant, sizes) for name, entrant in perceptrons.rows().items()}


def measured(turns: dict[str, Turn], rounds: int) -> dict[str, dict[str, float]]:
    """Return milliseconds of a step and its ratio to AdamW's, by row."""
    result = interleaved(turns, "AdamW", rounds=rounds)
    for row in result.values():
        row["ms"] /= TURN
    return result


def main(
    task: Literal["text-64", "perceptrons"] = TASK,
    threads: int = 1,
    rounds: int = 15,
    methods: tuple[str, ...] = ROWS,
    out: Path = RESULTS / "contest_step.json",
) -> None:
    """Measure and keep.

    Args:
        task: What is trained.
        threads: Of the process.
        rounds: Turns of ten steps of every row.
        methods: The rows on text; on perceptrons all are measured.
        out: The results file; times that it holds already are measured again.
    """
    torch.set_num_threads(threads)
    record = Results(out, {"threads": threads, "rounds": rounds, "turn": TURN})
    made: dict[str, Callable[[], dict[str, Turn]]] = {TASK: partial(text, methods)}
    if task == "perceptrons":
        # One after the other: all models at once would push each other out of the caches.
        nets = perceptrons.NETS.items()
        made = {f"perceptron {net}": partial(digits, sizes) for net, sizes in nets}
    for name, turns in made.items():
        record.runs[name] = measured(turns(), rounds)
        record.save()
        print(f"{name}\n{shown(record.runs[name])}", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
