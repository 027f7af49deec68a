"""``neurms demo``: a few optimizers on handwritten digits, compared in one table."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from neurms.cli.data import ImageData, Split, hold_out, load
from neurms.cli.environment import environment, flush_denormals
from neurms.cli.errors import UsageError, check_folder
from neurms.cli.methods import BUDGETS, Budget, Method, methods
from neurms.cli.tables import comparison, factorization, footnote
from neurms.cli.timing import StepTime, step_times
from neurms.cli.training import Outcome, fit, steps_of

__all__ = ["Demo", "run"]

ROUNDS = 24
"""Rounds of the interleaved step timing."""


@dataclass(frozen=True)
class Demo:
    """What a run of the demo measured.

    Args:
        data: Name of the data set.
        source: Where it was found.
        seed: Of the split, the first weights and the batches.
        validated: Number of images behind each accuracy.
        budget: Shared by all methods.
        methods: What was compared.
        outcomes: One training run for each method.
        times: One step time for each method.
        environment: Versions, threads, commit, denormals.
        seconds: Wall time of everything.
    """

    data: str
    source: str
    seed: int
    validated: int
    budget: Budget
    methods: tuple[Method, ...]
    outcomes: tuple[Outcome, ...]
    times: tuple[StepTime, ...]
    environment: dict[str, Any]
    seconds: float

    def as_json(self) -> str:
        """Return everything as JSON."""
        rows = [
            {**asdict(method), **asdict(outcome), "step": asdict(step)}
            for method, outcome, step in zip(self.methods, self.outcomes, self.times, strict=True)
        ]
        shared = {key: value for key, value in asdict(self).items() if key not in _PER_METHOD}
        return json.dumps({**shared, "methods": rows}, indent=1) + "\n"


_PER_METHOD = ("methods", "outcomes", "times")


def run(
    data: str = "digits",
    epochs: int | None = None,
    seed: int = 0,
    json_path: Path | None = None,
    console: Console | None = None,
    rounds: int = ROUNDS,
) -> Demo:
    """Train every method, time its steps, print the tables.

    Args:
        data: One of :data:`~neurms.cli.data.DATASETS`.
        epochs: Passes over the training part; None takes the data set's own budget.
        seed: Of the split, the first weights and the order of batches.
        json_path: Where to write the figures, or None.
        console: Where to print; None is the terminal.
        rounds: Rounds of the step timing.

    Returns:
        All figures.

    Raises:
        UsageError: ``epochs`` or ``seed`` is out of range, or ``json_path`` lies in no folder.
        ValueError: No data set has that name.
        DatasetError: The data could not be found.
    """
    start = time.perf_counter()
    _check(epochs, seed, json_path)
    console = console or Console()
    images = load(data)
    budget = BUDGETS[data] if epochs is None else replace(BUDGETS[data], epochs=epochs)
    train, validation = hold_out(images.train, budget.validation, seed)
    chosen = methods(data)
    console.print(_introduction(images, budget, len(train), len(validation), seed))
    with _measuring(budget.threads) as flushed:
        outcomes, times = _measure(chosen, train, validation, budget, seed, rounds, console)
        record = environment(denormals_flushed=flushed)
    demo = Demo(
        data=data,
        source=images.source,
        seed=seed,
        validated=len(validation),
        budget=budget,
        methods=chosen,
        outcomes=tuple(outcomes),
        times=tuple(times),
        environment=record,
        seconds=time.perf_counter() - start,
    )
    _print(demo, console)
    if json_path is not None:
        json_path.write_text(demo.as_json())
        console.print(f"Figures written to {json_path}")
    return demo


@contextmanager
def _measuring(threads: int | None) -> Iterator[bool]:
    """Set torch's threads and flush denormals for the block; yields whether they are flushed."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield flush_denormals()
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)


def _check(epochs: int | None, seed: int, json_path: Path | None) -> None:
    """Refuse what would only fail after minutes of training."""
    if epochs is not None and epochs < 1:
        raise UsageError(f"--epochs {epochs} must be at least 1; leave it out for the default")
    if seed < 0:
        raise UsageError(f"--seed {seed} must not be negative; 0 is the default")
    check_folder("--json", json_path)


def _introduction(images: ImageData, budget: Budget, train: int, held: int, seed: int) -> str:
    pixels = images.train.inputs.shape[1]
    shape = f"{pixels}-{budget.width}-{budget.width}-10"
    return (
        f"[bold]{images.name}[/] from {images.source}: {train:,} images to train on, {held:,} to "
        f"validate\nA {shape} ReLU network, batch {budget.batch}, {budget.epochs} epochs, cosine "
        f"schedule, seed {seed}\n"
    )


def _measure(
    chosen: Sequence[Method],
    train: Split,
    validation: Split,
    budget: Budget,
    seed: int,
    rounds: int,
    console: Console,
) -> tuple[list[Outcome], list[StepTime]]:
    columns = (
        TextColumn("{task.description:<16}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    steps = steps_of(budget, len(train))
    with Progress(*columns, console=console) as progress:
        lines = [
            progress.add_task(method.title, total=steps, start=False, note="") for method in chosen
        ]
        clock = progress.add_task("step times", total=rounds, start=False, note="")
        outcomes = []
        for method, line in zip(chosen, lines, strict=True):
            progress.start_task(line)
            report = _reporter(progress, line)
            outcomes.append(fit(method, train, validation, budget, seed, report))
        progress.start_task(clock)
        times = step_times(
            chosen,
            train,
            budget,
            rounds=rounds,
            report=lambda done: progress.update(clock, completed=done),
        )
    return outcomes, times


def _reporter(progress: Progress, line: Any) -> Callable[[int, float], None]:
    def report(step: int, accuracy: float) -> None:
        # NaN until the first epoch's validation.
        note = f"validation {accuracy:.1%}" if accuracy == accuracy else ""
        progress.update(line, completed=step, note=note)

    return report


def _print(demo: Demo, console: Console) -> None:
    console.print()
    console.print(comparison(demo.methods, demo.outcomes, demo.times))
    console.print(factorization(demo.methods, demo.outcomes))
    console.print(footnote(demo.environment, demo.budget.width, demo.validated, demo.seconds))
