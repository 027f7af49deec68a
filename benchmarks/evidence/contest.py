"""Running a comparison: each method's search, then its seeds; several processes may share it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from benchmarks.evidence.design import Design
from benchmarks.evidence.entrants import Entrant
from benchmarks.evidence.search import search
from benchmarks.harness import Results

__all__ = ["Task", "run"]

Make = Callable[[nn.Module], torch.optim.Optimizer]


class Task(Protocol):
    """What is trained: a run that its validation split judges, or its test split."""

    design: Design

    def train(self, make: Make, seed: int, *, reported: bool) -> dict[str, Any]:
        """Train once and return the figure under the name of the split that gave it."""


def run(tasks: Task | Mapping[str, Task], entrants: Mapping[str, Entrant], out: Path) -> bool:
    """Do what is missing of a comparison.

    Args:
        tasks: What is trained, the same by all or by the name of a row; one design for all.
        entrants: The methods, by the name of their row.
        out: The results file.

    Returns:
        Whether everything is done; False where another process is still at work on some of it.
    """
    rows = {name: entrant.recorded() for name, entrant in entrants.items()}
    own = tasks if isinstance(tasks, Mapping) else dict.fromkeys(entrants, tasks)
    (design,) = {json.dumps(task.design.recorded()): task.design for task in own.values()}.values()
    record = Results(out, {"design": design.recorded(), "rows": rows})
    waiting = list(entrants)
    while waiting:
        left = [name for name in waiting if not _row(record, own[name], name, entrants[name])]
        if len(left) == len(waiting):
            return False
        waiting = left
    return True


def _row(record: Results, task: Task, name: str, entrant: Entrant) -> bool:
    """Search and run the seeds of one row; False where another process has some of it."""
    with _claimed(record.path, name) as mine:
        if not mine:
            return False
        record.reload()
        chosen = _searched(record, task, name, entrant)
    done = True
    for seed in task.design.seeds:
        with _claimed(record.path, f"{name} {seed}") as mine:
            if mine:
                record.reload()
                _once(record, task, name, entrant, chosen, seed, reported=True)
            done &= mine
    return done


def _searched(record: Results, task: Task, name: str, entrant: Entrant) -> dict[str, float]:
    design, sign = task.design, 1.0 if task.design.better == "lower" else -1.0

    def loss_at(values: dict[str, float]) -> float:
        figures = [
            _once(record, task, name, entrant, values, seed, reported=False)[design.chosen_on]
            for seed in design.tuning_seeds
        ]
        # A run that diverged has no figure.
        return float("inf") if None in figures else sign * sum(figures)

    return entrant.space.values(search(entrant.space, loss_at, design.trials))


def _once(
    record: Results,
    task: Task,
    name: str,
    entrant: Entrant,
    values: dict[str, float],
    seed: int,
    *,
    reported: bool,
) -> dict[str, Any]:
    shown = " ".join(f"{key}={value:g}" for key, value in values.items())
    kind = "seed" if reported else "trial"
    made = record.made

    def work() -> dict[str, Any]:
        used: list[tuple[nn.Module, torch.optim.Optimizer]] = []

        def make(model: nn.Module) -> torch.optim.Optimizer:
            used.append((model, entrant.make(model, values)))
            return used[-1][1]

        found = task.train(make, seed, reported=reported)
        origin = {"commit": made["commit"], "machine": made["machine"]}
        run = {"row": name, "kind": kind, "seed": seed, "settings": values, **found, **origin}
        return run | {"precision": _precision(*used[-1])}

    return record.run(f"{name}/{kind} {seed}/{shown}", work)


def _precision(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Return the floating-point formats of weights, state and products, one if all are alike."""
    state = [t for kept in optimizer.state.values() for t in kept.values() if torch.is_tensor(t)]
    floating = [t.dtype for t in (*model.parameters(), *state) if t.is_floating_point()]
    products = [group["gemm"] for group in optimizer.param_groups if "gemm" in group]
    return ", ".join(sorted({*(str(d).removeprefix("torch.") for d in floating), *products}))


@contextmanager
def _claimed(path: Path, name: str) -> Iterator[bool]:
    """Give whether this process alone works on something; a claim ends with its process."""
    digest = hashlib.sha256(f"{path.resolve()} {name}".encode()).hexdigest()[:16]
    handle = os.open(Path(tempfile.gettempdir()) / f"neurms-{digest}.lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
    else:
        yield True
    finally:
        os.close(handle)
