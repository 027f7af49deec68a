"""Three profiled trainings on real data: rho of every layer as training goes on, and what it says.

    NEURMS_DATA=... python -m benchmarks.profiler_runs            # all three, some minutes
    NEURMS_DATA=... python -m benchmarks.profiler_runs --only cnn
    neurms report benchmarks/results/profiler/cnn.json --html cnn.html

An MLP on Fashion-MNIST, a small convolutional net on CIFAR-10 (from JPEG copies, so not comparable
with published accuracies) and a 2-layer transformer on the bytes of English prose, each trained by
NeuRMS-U with momentum .9 under a cosine schedule.
"""

from __future__ import annotations

import argparse
import io
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich import print as show
from torch import Tensor, nn

import neurms
from benchmarks.harness import RESULTS
from benchmarks.language import Scale, batch_of, prose
from benchmarks.llama_model import Llama
from neurms.cli.data import load
from neurms.cli.environment import environment, flush_denormals
from neurms.report import ProfilerReport

FOLDER = RESULTS / "profiler"
Batches = Iterator[tuple[Tensor, Tensor]]


def mlp() -> tuple[nn.Module, Batches, int]:
    data = load("fashion_mnist").train
    layers = [nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)]
    return nn.Sequential(*layers), _shuffled(data.inputs, data.labels), 1400


def cnn() -> tuple[nn.Module, Batches, int]:
    images, labels = _cifar(20_000)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip
    return model, _shuffled(images, labels), 600


def transformer() -> tuple[nn.Module, Batches, int]:
    tokens, _ = prose()
    return Llama(width=128, layers=2, heads=4), _windows(tokens), 500


RUNS: dict[str, tuple[Callable[[], tuple[nn.Module, Batches, int]], float]] = {
    "mlp": (mlp, 3e-3),
    "cnn": (cnn, 3e-3),
    "transformer": (transformer, 3e-3),
}


def train(name: str, steps: int | None) -> ProfilerReport:
    """Train one of the three and return what the profiler saw."""
    torch.manual_seed(0)
    build, lr = RUNS[name]
    model, batches, default = build()
    steps = steps or default
    optimizer = neurms.NeuRMS(model, lr=lr, variant="U", momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: _cosine(t, steps))
    every = max(steps // 24, 1)
    with neurms.profile(model, optimizer, every_n_steps=every, warmup_steps=5) as profiler:
        for step in range(steps):
            inputs, targets = next(batches)
            loss = F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step % 100 == 0 or step == steps - 1:
                print(f"{name} step {step}: loss {loss.item():.3f}", flush=True)
    report = profiler.report()
    about = {"name": name, "lr": lr, "last_loss": loss.item(), "environment": _environment()}
    report.run.header["benchmark"] = about
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(RUNS))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--out", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in [arguments.only] if arguments.only else list(RUNS):
        report = train(name, arguments.steps)
        report.to_json(arguments.out / f"{name}.json")
        show(report.table())
        for advice in report.advice():
            print(advice)


def _environment() -> dict[str, object]:
    return environment(denormals_flushed=flush_denormals())


def _shuffled(inputs: Tensor, labels: Tensor, batch: int = 128) -> Batches:
    while True:
        for rows in torch.randperm(len(labels)).split(batch):
            if len(rows) == batch:
                yield inputs[rows], labels[rows]


def _windows(tokens: Tensor) -> Batches:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield batch_of(tokens, generator, Scale())


def _cosine(step: int, steps: int, warmup: int = 50) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def _cifar(count: int) -> tuple[Tensor, Tensor]:
    """Return the first images, standardised by their channels' own mean and deviation."""
    from PIL import Image

    folder = os.environ.get("NEURMS_DATA")
    if folder is None:
        raise SystemExit("set NEURMS_DATA to the folder that holds cifar10_jpeg.npz")
    with np.load(Path(folder) / "cifar10_jpeg.npz") as archive:
        bytes_, ends, labels = archive["jpg_train"], archive["off_train"], archive["y_train"]
    decoded = [
        np.asarray(Image.open(io.BytesIO(bytes_[ends[i] : ends[i + 1]].tobytes())))
        for i in range(count)
    ]
    images = torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).float() / 255
    mean, deviation = images.mean((0, 2, 3)), images.std((0, 2, 3))
    images = (images - mean[:, None, None]) / deviation[:, None, None]
    return images.contiguous(), torch.from_numpy(labels[:count]).long().flatten()


if __name__ == "__main__":
    main()
