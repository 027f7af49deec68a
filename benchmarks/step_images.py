"""A whole training step (forward, backward, update) of ResNet-20 on 32 x 32 images, against SGD.

    neurms bench step_images --threads 2
    neurms bench step_images --threads 2 --channels-last

Batches of 128 random images, made anew for every turn; the baseline is torch's fused SGD, the times
are medians of interleaved turns. A turn is one step and one before it that is not counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

import neurms
from benchmarks.cifar import resnet20
from benchmarks.harness import RESULTS, Results
from benchmarks.interleaved import Turn, interleaved, shown

BATCH = 128
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd fused": ("sgd", {"fused": True}),
    "adamw fused": ("adamw", {"fused": True}),
    "NeuRMS-P": ("neurms", {"variant": "P"}),
    "NeuRMS-U": ("neurms", {"variant": "U"}),
    "NeuRMS-F": ("neurms", {"variant": "F"}),
    "RACS": ("racs", {"head": "rule"}),
    "RMNP": ("rmnp", {"head": "rule"}),
}


def turn(name: str, *, channels_last: bool = False, batch: int = BATCH) -> Turn:
    """Return a turn that takes a step of its own network.

    Args:
        name: Of :data:`OPTIMIZERS`.
        channels_last: Whether images and weights have this memory format.
        batch: Images in a step.
    """
    torch.manual_seed(0)
    memory = torch.channels_last if channels_last else torch.contiguous_format
    model = resnet20().to(memory_format=memory)
    kind, settings = OPTIMIZERS[name]
    optimizer = neurms.create(kind, model, lr=1e-3, **settings)

    def step(inputs: torch.Tensor, targets: torch.Tensor) -> None:
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    def data() -> tuple[torch.Tensor, torch.Tensor]:
        inputs = torch.randn(batch, 3, 32, 32).to(memory_format=memory)
        return inputs, torch.randint(10, (batch,))

    def prepare(number: int) -> Callable[[], None]:
        step(*data())
        inputs, targets = data()
        return lambda: step(inputs, targets)

    return prepare


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--only", nargs="*", choices=tuple(OPTIMIZERS), default=tuple(OPTIMIZERS))
    parser.add_argument("--out", type=Path, default=RESULTS / "step_images.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    results = Results(given.out, {"net": "resnet20", "batch": BATCH})
    names = dict.fromkeys(("sgd fused", *given.only))
    turns = {name: turn(name, channels_last=given.channels_last) for name in names}
    found = interleaved(turns, "sgd fused", rounds=given.rounds)
    memory = "channels last" if given.channels_last else "contiguous"
    key = f"resnet20 batch {BATCH}, {memory}, {given.threads} threads"
    print(f"{key}\n{shown(found)}")
    results.runs[key] = found
    results.save()


if __name__ == "__main__":
    main()
