"""MNIST by a multilayer perceptron: NeuRMS beside AdamW and SGD, equal budgets, several seeds.

Each method's learning rate is the best of one grid, by accuracy on 10,000 training images that the
grid's runs are not trained on; then each is trained on all of the training set with several seeds,
and its test accuracy is compared with AdamW's by a paired t-test. A killed run continues where it
was.

    neurms bench mnist
    neurms bench mnist --data fashion_mnist --seeds 3
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import neurms
from benchmarks.harness import RESULTS, Results
from benchmarks.significance import paired
from neurms.cli.data import Split, hold_out, load

GRID = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
BASELINE = "AdamW"
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD-momentum": ("sgd", {"momentum": 0.9}),
    "AdamW": ("adamw", {}),
    "NeuRMS-U": ("neurms", {"variant": "U", "momentum": 0.9}),
    "NeuRMS-B": ("neurms", {"variant": "B", "momentum": 0.9}),
    "NeuRMS-F": ("neurms", {"variant": "F", "momentum": 0.9}),
    "NeuRMS-U, plain": ("neurms", {"variant": "U"}),
}


def perceptron(features: int, width: int, classes: int = 10) -> nn.Sequential:
    """Return features-width-width-classes with ReLU."""
    return nn.Sequential(
        nn.Linear(features, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, classes),
    )


def accuracy(model: nn.Module, split: Split) -> float:
    with torch.no_grad():
        hits = [
            (model(inputs).argmax(1) == labels).sum()
            for inputs, labels in zip(
                split.inputs.split(2048), split.labels.split(2048), strict=True
            )
        ]
    return float(sum(hits)) / len(split)


def train(
    make: Callable[[nn.Module], torch.optim.Optimizer],
    data: Split,
    evaluation: Split,
    *,
    width: int,
    epochs: int,
    batch: int,
    seed: int,
) -> dict[str, Any]:
    """Train one network and return its accuracy, last loss and seconds of training."""
    torch.manual_seed(seed)
    model = perceptron(data.inputs.shape[1], width)
    optimizer = make(model)
    steps = epochs * (len(data) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    loss = torch.zeros(())
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(epochs):
        for index in _batches(len(data), batch):
            loss = nn.functional.cross_entropy(model(data.inputs[index]), data.labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return {
        "seconds": round(time.perf_counter() - wall, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "loss": round(float(loss.detach()), 5),
        "accuracy": accuracy(model, evaluation),
    }


def _batches(count: int, batch: int) -> tuple[Tensor, ...]:
    order = torch.randperm(count)
    return order[: count // batch * batch].split(batch)


def main(
    data: str = "mnist",
    methods: tuple[str, ...] = tuple(METHODS),
    seeds: int = 5,
    epochs: int = 2,
    batch: int = 128,
    width: int = 512,
    out: Path | None = None,
) -> None:
    """Compare optimizers on a small image set.

    Args:
        data: mnist, fashion_mnist or digits.
        methods: Which methods, by the names of the table.
        seeds: Runs of each method at its best learning rate.
        epochs: Passes over the training set, for every method.
        batch: Examples in a batch.
        width: Units of the two hidden layers.
        out: Where results are kept; by default benchmarks/results/DATA.json.
    """
    if unknown := sorted(set(methods) - set(METHODS)):
        raise SystemExit(f"error: --methods {unknown} not known; choose from {list(METHODS)}")
    images = load(data)
    fitting, validation = hold_out(images.train, len(images.train) // 6, seed=0)
    full, test = (images.train, images.test) if images.test else (fitting, validation)
    settings = {"data": data, "epochs": epochs, "batch": batch, "width": width, "grid": GRID}
    results = Results(out or RESULTS / f"{data}.json", settings)
    shape = {"width": width, "epochs": epochs, "batch": batch}

    def accuracy_of(
        key: str, method: str, lr: float, seed: int, part: tuple[Split, Split]
    ) -> float:
        name, options = METHODS[method]
        result = results.run(
            key,
            lambda: train(
                lambda model: neurms.create(name, model, lr=lr, **options),
                *part,
                seed=seed,
                **shape,
            ),
        )
        return float(result["accuracy"])

    rows = []
    for method in methods:
        grid = {
            lr: accuracy_of(f"{method}/grid/{lr:g}", method, lr, 0, (fitting, validation))
            for lr in GRID
        }
        lr = max(grid, key=grid.__getitem__)
        scores = [
            accuracy_of(f"{method}/lr {lr:g}/seed {seed}", method, lr, seed, (full, test))
            for seed in range(seeds)
        ]
        finals = [results.runs[f"{method}/lr {lr:g}/seed {seed}"] for seed in range(seeds)]
        rows.append(
            {
                "method": method,
                "settings": METHODS[method][1],
                "lr": lr,
                "validation": grid[lr],
                "mean": statistics.fmean(scores),
                "std": statistics.stdev(scores) if seeds > 1 else float("nan"),
                "seconds": statistics.median(run["seconds"] for run in finals),
                "cpu_seconds": statistics.median(run["cpu_seconds"] for run in finals),
                "scores": scores,
            }
        )
    _compare(rows)
    results.save(summary=rows, source=images.source)
    _show(rows, results, data, seeds, epochs)


def _compare(rows: list[dict[str, Any]]) -> None:
    """Add each method's paired comparison with the baseline."""
    baseline = next((row for row in rows if row["method"] == BASELINE), None)
    for row in rows:
        if baseline is not None and row is not baseline:
            row["against_baseline"] = paired(row["scores"], baseline["scores"])


def _show(rows: list[dict[str, Any]], results: Results, data: str, seeds: int, epochs: int) -> None:
    machine = results.content["environment"]
    table = Table(
        title=f"{data}: {epochs} epochs, {seeds} seeds",
        caption_justify="left",
        box=SIMPLE,
        padding=(0, 1, 0, 0),
    )
    table.add_column("method", no_wrap=True)
    for heading in ("lr", "valid.", "test", "std", f"-{BASELINE}", "p", "wall s", "cpu s"):
        table.add_column(heading, justify="right")
    for row in rows:
        against = row.get("against_baseline")
        table.add_row(
            row["method"],
            f"{row['lr']:g}",
            f"{row['validation']:.4f}",
            f"{row['mean']:.4f}",
            f"{row['std']:.4f}",
            f"{100 * against['difference']:+.2f}" if against else "",
            f"{against['p']:.3f}" if against else "",
            f"{row['seconds']:.1f}",
            f"{row['cpu_seconds']:.1f}",
        )
    flushed = "" if machine["denormals_flushed"] else "not "
    table.caption = (
        "Momentum .9, but for AdamW and the plain one; torch's own defaults for SGD and AdamW. "
        f"lr: best of {', '.join(f'{lr:g}' for lr in GRID)} on held-out training images (valid.). "
        f"test: mean over seeds; -{BASELINE}: in points, with a paired t-test's p. "
        f"Seconds: median run, {machine['threads']} thread(s), denormals {flushed}flushed; wall "
        "time suffers from other loads."
    )
    Console().print(table)
    print(f"Every run is in {results.path}")


if __name__ == "__main__":
    tyro.cli(main)
