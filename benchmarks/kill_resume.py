"""Kill a training process at random moments, resume it, and compare with a run left alone.

    neurms bench kill_resume --kills 50

Each kill is a SIGKILL: half of them at a random moment of a random step, half at a random moment of
a checkpoint's writing or just after. The resumed run's weights, optimizer state and random state
must equal those of the uninterrupted run bit for bit. Processes are forked from one that has only
imported things.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks.faults.progress import Progress
from benchmarks.harness import RESULTS, Results

FRONTS = {
    "lightning": "benchmarks.faults.lightning_run",
    "keras": "benchmarks.faults.keras_run",
}
PATIENCE = 600.0
"""Seconds after which a process that does not get where it is to be killed is killed anyway."""


def begin(module: ModuleType, folder: Path, run: str) -> int:
    """Start training in a process of its own; return its id."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    try:
        torch.set_num_threads(1)
        end = module.train(folder, run, Progress(folder / "progress"))
        torch.save(end, folder / "partial.pt")
        os.replace(folder / "partial.pt", folder / "end.pt")
        Progress(folder / "progress").now("end", 0)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def finished(process: int) -> dict[str, Any] | None:
    """Wait for a process that is to end well."""
    _, status = os.waitpid(process, 0)
    if status:
        raise SystemExit(f"error: a training process ended with status {status}; see above")
    return None


def kill(module: ModuleType, folder: Path, run: str, chance: random.Random, seconds: float) -> Any:
    """Start a run, kill it, and return where it was."""
    while True:
        for path in folder.iterdir():
            path.unlink()
        note = Progress(folder / "progress")
        process, started = begin(module, folder, run), time.perf_counter()
        in_save = chance.random() < 0.5
        wanted = chance.randrange(2, module.STEPS, 2) if in_save else chance.randrange(module.STEPS)
        reached = False
        while not reached and time.perf_counter() - started < PATIENCE:
            time.sleep(1e-4)
            phase, step = note.read()
            reached = phase == "end" or (step >= wanted and (phase == "save" or not in_save))
        time.sleep(chance.uniform(0.0, seconds / module.STEPS))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        # One that came too late is no kill.
        if note.read()[0] != "end":
            return note.read()


def differing(first: Any, second: Any, path: str = "") -> list[str]:
    """Return where two nested results differ in a bit."""
    if isinstance(first, torch.Tensor):
        alike = first.dtype == second.dtype and torch.equal(first, second)
        return [] if alike else [path]
    if isinstance(first, dict):
        if first.keys() != second.keys():
            return [path]
        return [d for k in first for d in differing(first[k], second[k], f"{path}/{k}")]
    if isinstance(first, (list, tuple)):
        if len(first) != len(second):
            return [path]
        return [
            d
            for i, (a, b) in enumerate(zip(first, second, strict=True))
            for d in differing(a, b, f"{path}/{i}")
        ]
    return [] if first == second or path.endswith("resumed from") else [path]


def uninterrupted(module: ModuleType, run: str) -> tuple[Any, float]:
    """Return the end of a run that nobody kills, and its seconds."""
    with tempfile.TemporaryDirectory() as name:
        start = time.perf_counter()
        finished(begin(module, Path(name), run))
        return torch.load(Path(name) / "end.pt", weights_only=True), time.perf_counter() - start


def one(module: ModuleType, run: str, seed: int, reference: Any, seconds: float) -> dict[str, Any]:
    """Kill a run once, resume it, compare."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        phase, step = kill(module, folder, run, random.Random(seed), seconds)
        partial = any("partial" in path.name for path in folder.iterdir())
        finished(begin(module, folder, run))
        end = torch.load(folder / "end.pt", weights_only=True)
    return {
        "run": run,
        "killed in": phase,
        "at step": step,
        "partial file left": partial,
        "resumed from": end["resumed from"],
        "differs in": differing(reference, end)[:5],
    }


def main() -> None:
    """Kill, resume, compare, and keep what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="kills of each front end")
    parser.add_argument("--front", choices=FRONTS, action="append")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "kill_resume.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(arguments.out, {"seed": arguments.seed})
    for front in arguments.front or FRONTS:
        module = importlib.import_module(FRONTS[front])
        references = {run: uninterrupted(module, run) for run in module.RUNS}
        names = list(module.RUNS)
        for number in range(arguments.kills):
            run = names[number % len(names)]
            seed = arguments.seed * 1000 + number
            results.run(
                f"{front} {number}",
                lambda m=module, r=run, s=seed, own=references[run]: one(m, r, s, *own),
            )
    bad = [key for key, found in results.runs.items() if found["differs in"]]
    results.save()
    print(f"{len(results.runs)} kills, {len(bad)} resumed runs differ from the uninterrupted one")
    if bad:
        raise SystemExit(f"error: {bad} differ")


if __name__ == "__main__":
    main()
