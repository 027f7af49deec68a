"""MNIST and Fashion-MNIST perceptrons at equal wall-clock: every method trains as long as the rest.

A budget in seconds gives each method as many steps as its own step time allows (measured side by
side by ``neurms bench step_times``, one thread), with its own warmup and cosine over those steps.
Learning rates are searched for each method, data set and budget on 10,000 training images that the
search does not train on, the same number of trials for each; five seeds at the best one then train
on all of the training set and are tested. A killed sweep continues where it was.

    neurms bench perceptrons --data mnist fashion_mnist --seconds 0.3 1 5 --workers 2
    neurms bench perceptrons --net 784-1024-10 784-1024-1024-10 --seconds 1 5
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.harness import RESULTS, Results
from benchmarks.sweep import sweep
from benchmarks.tuning import tune
from benchmarks.vision import METHODS, perceptron, train
from neurms.cli.data import Split, hold_out, load

BATCH = 128
TRIALS = 4
REFINED = 2
TOLERANCE = 0.03
"""By how much a step time measured anew may differ before the seeds are run again."""
TIMES = RESULTS / "step_times.json"


@dataclass(frozen=True)
class Study:
    """One method in one place of the table."""

    data: str
    net: str
    seconds: float
    method: str
    seeds: int
    out: Path

    @property
    def key(self) -> str:
        """What its runs' keys begin with."""
        return f"{self.data}/{self.net}/{self.seconds:g} s/{self.method}"

    @property
    def steps(self) -> int:
        """How many steps its seconds are worth."""
        return max(10, round(1e3 * self.seconds / step_ms(self.net)[self.method]))


@functools.cache
def results_in(path: Path) -> Results:
    """Return the results kept in a file."""
    shared = {"batch": BATCH, "trials": TRIALS + REFINED, "warmup": "a tenth", "schedule": "cosine"}
    return Results(path, shared)


def step_ms(net: str, times: Mapping[str, Any] | None = None) -> dict[str, float]:
    """Return the milliseconds of a step by method, on one thread.

    They are the measured ratios to AdamW's times the milliseconds that AdamW's took when the
    network was first measured: a second then stays the same number of AdamW's steps whenever step
    times are measured anew, and only ratios count.

    Args:
        net: Sizes of the layers.
        times: The runs of ``step_times``; by default those in its results file.
    """
    key = f"{net} batch {BATCH} threads 1"
    if times is None:
        times = json.loads(TIMES.read_text())["runs"] if TIMES.is_file() else {}
    if key not in times:
        raise SystemExit(
            f"error: {TIMES} has no times of {key!r}; run neurms bench step_times --net {net} "
            "--threads 1 first"
        )
    first = times.get(f"{net} reference", times[key]["AdamW"])["ms"]
    return {name: row["ratio"] * first for name, row in times[key].items()}


@functools.cache
def parts(data: str) -> tuple[tuple[Split, Split], tuple[Split, Split]]:
    """Return (fitting, validation) for the search and (training, test) for the seeds."""
    images = load(data)
    if images.test is None:
        raise SystemExit(f"error: {data} has no test part; choose mnist or fashion_mnist")
    return hold_out(images.train, len(images.train) // 6, seed=0), (images.train, images.test)


def steps_of(study: Study, lr: float, runs: Mapping[str, Any]) -> int:
    """Return the study's steps, or those of finished runs where measuring anew changed little."""
    for key in runs:
        if key.startswith(f"{study.key}/steps ") and f"/lr {lr:g}/" in key:
            known = int(key.removeprefix(f"{study.key}/steps ").split("/")[0])
            if abs(known / study.steps - 1) <= TOLERANCE:
                return known
    return study.steps


def work(study: Study) -> None:
    """Search the learning rate and train the seeds at the best one."""
    results = results_in(study.out)
    search, final = parts(study.data)
    method = METHODS[study.method]
    sizes = tuple(map(int, study.net.split("-")))

    def run(
        key: str, lr: float, seed: int, part: tuple[Split, Split], steps: int = study.steps
    ) -> float:
        result = results.run(
            key,
            lambda: train(
                lambda: perceptron(sizes),
                lambda model: method.make(model, lr),
                *part,
                steps=steps,
                batch=BATCH,
                seed=seed,
            ),
            cost=study.seconds,
        )
        return float(result["accuracy"])

    lr = tune(
        lambda lr: run(f"{study.key}/search/lr {lr:g}", lr, 0, search),
        method.lr,
        trials=TRIALS,
        refine=REFINED,
    )
    steps = steps_of(study, lr, results.runs)
    for seed in range(study.seeds):
        run(f"{study.key}/steps {steps}/lr {lr:g}/seed {seed}", lr, seed, final, steps)


def main(
    data: tuple[str, ...] = ("mnist", "fashion_mnist"),
    net: tuple[str, ...] = ("784-512-10",),
    seconds: tuple[float, ...] = (0.3, 1.0, 5.0),
    methods: tuple[str, ...] = tuple(METHODS),
    seeds: int = 5,
    workers: int = 1,
    out: Path = RESULTS / "perceptrons.json",
) -> None:
    """Train every method for the same time.

    Args:
        data: mnist, fashion_mnist.
        net: Sizes of the layers, of one or more networks.
        seconds: Training times.
        methods: Which methods.
        seeds: Runs at the best learning rate.
        workers: Processes.
        out: Where results are kept.
    """
    if unknown := sorted(set(methods) - set(METHODS)):
        raise SystemExit(f"error: --methods {unknown} not known; choose from {list(METHODS)}")
    torch.set_num_threads(workers)
    studies = [
        Study(name, layers, duration, method, seeds, out)
        for duration in seconds
        for layers in net
        for name in data
        for method in methods
    ]
    if workers == 1:
        results_in(out).expect(sum(s.seconds * (TRIALS + REFINED + s.seeds) for s in studies))
    sweep(studies, work, workers)


if __name__ == "__main__":
    tyro.cli(main)
