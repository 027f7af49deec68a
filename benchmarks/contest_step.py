"""A whole training step of a comparison's rows, side by side in one process.

Batch, forward, backward, update and schedule, as in training; the rows take turns of ten steps, so
that a drift of the machine hits all alike. Each row has the settings that its search begins at. The
comparisons at equal time turn seconds into steps by these files, the chart on the first page steps
into seconds.

    neurms bench contest_step --task text
    neurms bench contest_step --task perceptrons
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.evidence import entrants, perceptrons, text
from benchmarks.harness import Results
from benchmarks.interleaved import Turn, interleaved, shown
from benchmarks.language import Scale, batch_of, loss_of
from benchmarks.vision import batches, perceptron, schedule

TURN = 10
EXAMPLES = 10_000


def turn(entrant: entrants.Entrant, model: nn.Module, gradients: Callable[[], None]) -> Turn:
    """Return a turn of ten training steps.

    Args:
        entrant: The row.
        model: Of its own.
        gradients: Takes a batch and goes forward and backward.
    """
    # A rate at which nothing leaves the finite numbers, however many steps there are.
    values = {**entrant.space.values(entrant.space.origin), "lr": 1e-5}
    optimizer = entrant.make(model, values)
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


def on_text(entrant: entrants.Entrant, scale: Scale) -> Turn:
    """Return a row's turn on random bytes."""
    model = scale.model(0)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(256, (100_000,), generator=generator, dtype=torch.uint8)

    def gradients() -> None:
        loss_of(model, *batch_of(tokens, generator, scale)).backward()

    return turn(entrant, model, gradients)


def on_digits(entrant: entrants.Entrant, sizes: tuple[int, ...]) -> Turn:
    """Return a row's turn on random images."""
    torch.manual_seed(0)
    inputs, labels = torch.randn(EXAMPLES, sizes[0]), torch.randint(sizes[-1], (EXAMPLES,))
    model = perceptron(sizes)
    order = batches(EXAMPLES, perceptrons.BATCH, torch.Generator().manual_seed(0))

    def gradients() -> None:
        index = next(order)
        cross_entropy(model(inputs[index]), labels[index]).backward()

    return turn(entrant, model, gradients)


def words(scale: Scale) -> dict[str, Turn]:
    """Return the turns of the rows that text is compared by at equal time."""
    known = entrants.text()
    return {name: on_text(known[name], scale) for name in text.TIMED_ROWS}


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
    task: Literal["text", "perceptrons"] = "text",
    threads: int = 1,
    rounds: int = 15,
    out: Path | None = None,
) -> None:
    """Measure and keep.

    Args:
        task: What is trained.
        threads: Of the process.
        rounds: Turns of ten steps of every row.
        out: The results file, by default the one that the comparison reads; times that it holds
            already are measured again.
    """
    torch.set_num_threads(threads)
    # One model's rows after the other's: all at once would push each other out of the caches.
    if task == "text":
        path = text.TIMES
        made = {name: partial(words, text.SCALES[name]) for name in text.TIMED.values()}
    else:
        path = perceptrons.TIMES
        made = {f"perceptron {n}": partial(digits, sizes) for n, sizes in perceptrons.NETS.items()}
    record = Results(out or path, {"threads": threads, "rounds": rounds, "turn": TURN})
    for name, turns in made.items():
        record.runs[name] = measured(turns(), rounds)
        record.save()
        print(f"{name}\n{shown(record.runs[name])}", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
