"""``neurms demo``: what one would choose among, on one small task, in a table and a picture."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from neurms.cli.environment import environment, flush_denormals
from neurms.cli.errors import UsageError, check_folder
from neurms.cli.methods import Method, methods
from neurms.cli.page import page
from neurms.cli.picture import Curve, picture
from neurms.cli.tables import cells, comparison, footnote
from neurms.cli.tasks import Task, task
from neurms.cli.timing import StepTime, step_times
from neurms.cli.training import Outcome, fit

__all__ = ["Demo", "run"]

ROUNDS = 10
"""Rounds of the interleaved step timing."""


@dataclass(frozen=True)
class Demo:
    """What a run of the demo measured.

    Args:
        data: Name of the data set.
        source: Where it was found.
        described: The data and the network.
        figure: What each run ends with.
        steps: Of each run.
        seed: Of the first weights and the batches, and of a split of images.
        methods: What was compared.
        outcomes: One training run for each method.
        times: One step time for each method.
        environment: Versions, threads, commit, denormals.
        seconds: Wall time of everything.
    """

    data: str
    source: str
    described: str
    figure: str
    steps: int
    seed: int
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

    def as_html(self) -> str:
        """Return the picture and the table as one page."""
        return page(
            f"{self.described}; {self.steps} steps, seed {self.seed}. Data: {self.source}.",
            {m.title: o.curve for m, o in zip(self.methods, self.outcomes, strict=True)},
            [step.milliseconds for step in self.times],
            cells(self.methods, self.outcomes, self.times, self.figure),
            footnote(self.environment, self.seconds),
        )


_PER_METHOD = ("methods", "outcomes", "times")


def run(
    data: str = "manual",
    epochs: int | None = None,
    seed: int = 0,
    json_path: Path | None = None,
    html_path: Path | None = None,
    console: Console | None = None,
    rounds: int = ROUNDS,
) -> Demo:
    """Train every method, time its steps, print the table and the picture.

    Args:
        data: One of :data:`~neurms.cli.tasks.TASKS`.
        epochs: Passes over the training images, or of 200 steps of text; None is the task's own.
        seed: Of the first weights and the order of batches, and of a split of images.
        json_path: Where to write the figures, or None.
        html_path: Where to write the page with picture and table, or None.
        console: Where to print; None is the terminal.
        rounds: Rounds of the step timing.

    Returns:
        All figures.

    Raises:
        UsageError: ``epochs`` or ``seed`` is out of range, or a path lies in no folder.
        ValueError: No data set has that name.
        DatasetError: The data could not be found.
    """
    start = time.perf_counter()
    _check(epochs, seed, {"--json": json_path, "--html": html_path})
    console = console or Console()
    chosen, trained = methods(data), task(data, epochs, seed)
    console.print(
        f"[bold]{trained.source}[/]\n{trained.described}\n{trained.steps} steps, seed {seed}\n"
    )
    with _measuring() as flushed:
        outcomes, times = _measure(chosen, trained, seed, rounds, console)
        record = environment(denormals_flushed=flushed)
    demo = Demo(
        data=data,
        source=trained.source,
        described=trained.described,
        figure=trained.figure,
        steps=trained.steps,
        seed=seed,
        methods=chosen,
        outcomes=tuple(outcomes),
        times=tuple(times),
        environment=record,
        seconds=time.perf_counter() - start,
    )
    _print(demo, console)
    for path, text in ((json_path, demo.as_json()), (html_path, demo.as_html())):
        if path is not None:
            path.write_text(text, encoding="utf-8")
            console.print(f"Written to {path}", soft_wrap=True)
    return demo


@contextmanager
def _measuring() -> Iterator[bool]:
    """Use one thread and flush denormals for the block; yields whether they are flushed."""
    before = torch.get_num_threads()
    # Products this small gain nothing from a second thread, and lose much on a busy machine.
    torch.set_num_threads(1)
    try:
        yield flush_denormals()
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)


def _check(epochs: int | None, seed: int, paths: dict[str, Path | None]) -> None:
    """Refuse what would only fail after a minute of training."""
    if epochs is not None and epochs < 1:
        raise UsageError(f"--epochs {epochs} must be at least 1; leave it out for the default")
    if seed < 0:
        raise UsageError(f"--seed {seed} must not be negative; 0 is the default")
    for option, path in paths.items():
        check_folder(option, path)
        if path is not None and path.is_dir():
            raise UsageError(f"{option} {path} is a folder; name a file in it")


def _measure(
    chosen: Sequence[Method], trained: Task, seed: int, rounds: int, console: Console
) -> tuple[list[Outcome], list[StepTime]]:
    columns = (
        TextColumn("{task.description:<20}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        lines = [
            progress.add_task(method.title, total=trained.steps, start=False, note="")
            for method in chosen
        ]
        clock = progress.add_task("step times", total=rounds, start=False, note="")
        outcomes = []
        for method, line in zip(chosen, lines, strict=True):
            progress.start_task(line)
            outcomes.append(fit(method.optimize, trained, seed, _reporter(progress, line)))
        progress.start_task(clock)
        times = step_times(
            chosen,
            trained,
            rounds=rounds,
            report=lambda done: progress.update(clock, completed=done),
        )
    return outcomes, times


def _reporter(progress: Progress, line: Any) -> Callable[[int, float], None]:
    def report(step: int, loss: float) -> None:
        # NaN until the first validation.
        note = f"loss {loss:.3f}" if loss == loss else ""
        progress.update(line, completed=step, note=note)

    return report


def _print(demo: Demo, console: Console) -> None:
    curves = [
        Curve(method.title, outcome.curve)
        for method, outcome in zip(demo.methods, demo.outcomes, strict=True)
    ]
    plain = not console.encoding.lower().startswith("utf")
    wide = max(20, min(console.width, 80) - 12)
    console.print("\nValidation loss")
    console.print(picture(curves, width=wide, letters=plain))
    console.print()
    console.print(comparison(cells(demo.methods, demo.outcomes, demo.times, demo.figure)))
    console.print(footnote(demo.environment, demo.seconds))
