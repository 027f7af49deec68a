"""CIFAR-10 (JPEG) by a small convolutional network and by ResNet-20, a reduced number of steps.

The images come from JPEG copies, so that no accuracy here compares with published ones. Learning
rates are searched for each method with the same number of trials on a tenth of the training images;
then each seed trains on all of them. All methods get the same number of steps.

    NEURMS_DATA=... neurms bench cifar
    NEURMS_DATA=... neurms bench cifar --net resnet20 --steps 100 --seeds 1
"""

from __future__ import annotations

import functools
import io
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn

from benchmarks.harness import RESULTS, Results
from benchmarks.tuning import tune
from benchmarks.vision import METHODS, Method, train
from neurms.cli.data import Split, hold_out

BATCH = 128
TRIALS = 5
CHOSEN = ("SGD-momentum", "AdamW", "NeuRMS-U-momentum", "NeuRMS-F-momentum", "RMNP", "RACS", "Muon")


@functools.cache
def images(part: str, count: int) -> Split:
    """Return the first images of a part ("jpg_train", "jpg_test"), standardised by channel."""
    import numpy as np
    from PIL import Image

    folder = os.environ.get("NEURMS_DATA")
    path = Path(folder or ".") / "cifar10_jpeg.npz"
    if not path.is_file():
        raise SystemExit("error: set NEURMS_DATA to a folder that holds cifar10_jpeg.npz")
    with np.load(path) as archive:
        stream, offsets = archive[f"jpg_{part}"].tobytes(), archive[f"off_{part}"]
        labels = archive[f"y_{part}"]
    count = min(count, len(labels))
    pixels = np.stack(
        [
            np.asarray(Image.open(io.BytesIO(stream[offsets[i] : offsets[i + 1]])).convert("RGB"))
            for i in range(count)
        ]
    )
    inputs = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    # The training set's channel means and a common deviation, so that both parts agree.
    mean = torch.tensor([0.4913, 0.4821, 0.4465])[:, None, None]
    return Split(
        ((inputs - mean) / 0.25).contiguous(),
        torch.as_tensor(labels[:count]).long().flatten(),
    )


def flip(inputs: Tensor, generator: torch.Generator) -> Tensor:
    """Return the images, each mirrored with probability a half."""
    mirrored = torch.rand(len(inputs), generator=generator) < 0.5
    return torch.where(mirrored[:, None, None, None], inputs.flip(3), inputs)


def small(channels: int = 3) -> nn.Sequential:
    """Return three convolutions (24, 48, 96 channels, two of them strided) and a linear head."""
    layers: list[nn.Module] = []
    for before, after, stride in ((channels, 24, 1), (24, 48, 2), (48, 96, 2)):
        layers += [
            nn.Conv2d(before, after, 3, stride=stride, padding=1),
            nn.BatchNorm2d(after),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(384, 10))


class Block(nn.Module):
    """A basic residual block; the shortcut of a wider block subsamples and pads with zeros."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.stride = 1 if before == after else 2
        self.padding = after - before
        self.layers = nn.Sequential(
            nn.Conv2d(before, after, 3, self.stride, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False),
            nn.BatchNorm2d(after),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Return relu(layers(x) + shortcut(x))."""
        shortcut = inputs[:, :, :: self.stride, :: self.stride]
        shortcut = nn.functional.pad(shortcut, (0, 0, 0, 0, 0, self.padding))
        return torch.relu(self.layers(inputs) + shortcut)


def resnet20() -> nn.Sequential:
    """Return the CIFAR ResNet of 20 layers (He et al., 2016), option A shortcuts."""
    widths = [16] * 4 + [32] * 3 + [64] * 3
    blocks = [Block(a, b) for a, b in pairwise(widths)]
    stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


NETS = {"small": small, "resnet20": resnet20}


def chosen(name: str) -> Method:
    """Return the method as it runs on convolutions, which have no update in backward."""
    method = METHODS[name]
    settings: dict[str, Any] = {
        k: v for k, v in method.settings.items() if k not in ("update", "gemm")
    }
    return Method(method.rule, method.lr, settings)


def main(
    net: str = "small",
    methods: tuple[str, ...] = CHOSEN,
    steps: int = 300,
    search_steps: int = 100,
    seeds: int = 3,
    train_images: int = 50_000,
    out: Path = RESULTS / "cifar.json",
) -> None:
    """Train a convolutional network by several methods.

    Args:
        net: small or resnet20.
        methods: Which methods, by the names of ``neurms bench perceptrons``.
        steps: Of a seed's run.
        search_steps: Of a run that looks for the learning rate.
        seeds: Runs at the best one.
        train_images: How many of the 50,000 are used.
        out: Where results are kept.
    """
    torch.set_num_threads(1)
    if net not in NETS:
        raise SystemExit(f"error: --net {net} not known; choose from {list(NETS)}")
    results = Results(out, {"batch": BATCH, "trials": TRIALS, "augmentation": "mirror"})
    full, test = images("train", train_images), images("test", 10_000)
    fitting, validation = hold_out(full, len(full) // 10, seed=0)
    results.expect(len(methods) * (TRIALS * search_steps + seeds * steps))

    def run(key: str, name: str, lr: float, count: int, seed: int, *part: Split) -> float:
        result = results.run(
            key,
            lambda: train(
                NETS[net],
                lambda model: chosen(name).make(model, lr),
                *part,
                steps=count,
                batch=BATCH,
                seed=seed,
                augment=flip,
            ),
            cost=count,
        )
        return float(result["accuracy"])

    for name in methods:
        search = f"{net}/{name}/search, {search_steps} steps, {len(fitting)} images"
        lr = tune(
            lambda lr: run(
                f"{search}/lr {lr:g}",  # noqa: B023
                name,  # noqa: B023
                lr,
                search_steps,
                0,
                fitting,
                validation,
            ),
            METHODS[name].lr,
            trials=TRIALS,
        )
        for seed in range(seeds):
            key = f"{net}/{name}/{steps} steps, {len(full)} images/lr {lr:g}/seed {seed}"
            run(key, name, lr, steps, seed, full, test)


if __name__ == "__main__":
    tyro.cli(main)
