"""Methods against each other under the rules of benchmarks/README.md, one task at a time.

Each finished run is written at once: an interrupted command goes on where it stopped, and several
may work on the same file at the same time.

    NEURMS_DATA=... neurms bench contest --task text-64
    NEURMS_DATA=... neurms bench contest --task text-64 --methods AdamW RACS
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import tyro

from benchmarks.evidence import contest, demo, entrants, images, perceptrons, tags, text
from benchmarks.evidence.ledger import rows
from benchmarks.harness import RESULTS

TASKS: dict[str, Callable[[], contest.Task]] = {
    **text.TASKS,
    **images.TASKS,
    **demo.TASKS,
    **tags.TASKS,
}
"""Tasks whose runs are equally long in steps, by name; the others' are in time."""

TIMED: dict[str, Callable[[str, str], contest.Task]] = {
    **dict.fromkeys(text.TIMED, text.timed),
    **dict.fromkeys(perceptrons.PLACES, perceptrons.task),
}
"""Tasks whose runs take as many steps as each row's step time allows, from task and row."""

FEWER: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(text.TIMED, text.TIMED_ROWS),
    **dict.fromkeys(demo.TASKS, demo.ROWS),
}
"""Tasks on text that compare some rows alone, and which."""

BEGINS_AS = {"Muon 3 rounds": "Muon"}
"""Rows that the smaller scale does not have -> whose settings there they begin at."""


def begun(methods: dict[str, entrants.Entrant], smaller: Path) -> dict[str, entrants.Entrant]:
    """Return methods whose searches begin where those of a smaller scale ended."""
    if not smaller.is_file():
        return methods
    ended = {row.name: dict(row.chosen) for row in rows(json.loads(smaller.read_text()))}
    ended = {name: ended[own] for name, own in BEGINS_AS.items() if own in ended} | ended
    return {
        name: replace(entrant, space=entrant.space.begun_at(ended[name]))
        if name in ended
        else entrant
        for name, entrant in methods.items()
    }


def entrants_of(task: str) -> dict[str, entrants.Entrant]:
    """Return the methods that a task compares, by the name of their row."""
    if task == "text-64":
        return entrants.text()
    if task in (*text.TASKS, *text.TIMED, *demo.TASKS):
        known = begun(entrants.text(), RESULTS / "contests" / "text-64.json")
        return {name: known[name] for name in FEWER.get(task, known)}
    if task in tags.TASKS:
        return entrants.tags()
    if task in perceptrons.PLACES:
        return perceptrons.rows()
    return entrants.images(norms=task != "mnist")


def main(
    task: str = "text-64", methods: tuple[str, ...] = (), threads: int = 1, out: Path | None = None
) -> None:
    """Search and run what is missing of one comparison.

    Args:
        task: What is trained.
        methods: Rows to work on; all by default.
        threads: Of the process.
        out: Where results are kept; by default benchmarks/results/contests/TASK.json.
    """
    if task not in (names := [*TASKS, *TIMED]):
        raise SystemExit(f"error: --task {task} not known; choose from {names}")
    known = entrants_of(task)
    if unknown := sorted(set(methods) - set(known)):
        raise SystemExit(f"error: --methods {unknown} not known; choose from {list(known)}")
    torch.set_num_threads(threads)
    chosen = {name: known[name] for name in methods or known}
    path = out or RESULTS / "contests" / f"{task}.json"
    if task in TASKS:
        tasks: contest.Task | dict[str, contest.Task] = TASKS[task]()
    else:
        tasks = {name: TIMED[task](task, name) for name in chosen}
    if not contest.run(tasks, chosen, path):
        print("the rest is being worked on by another process")


if __name__ == "__main__":
    tyro.cli(main)
