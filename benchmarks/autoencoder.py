"""MNIST's deep autoencoder by second-order methods, as in the shared-basis paper, fewer epochs.

784-1000-500-250-30-250-500-1000-784 with tanh, batch 1000, the loss the sum over pixels of the
cross entropy of an image; a twentieth of the steps warms up, then a linear decay. Every method gets
the same number of learning rates, a factor of three apart, each over the first steps alone, then
one run with the best. Seconds: steps times the step time, measured side by side with ``--time``.

    neurms bench autoencoder --time
    neurms bench autoencoder --epochs 2
"""

from __future__ import annotations

import statistics
import time as clock
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from benchmarks.harness import RESULTS, Results
from benchmarks.tuning import tune
from benchmarks.vision import Method, batches
from neurms.cli.data import load
from neurms.core.optimizers.plan import tensor_bytes

SIZES = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
BATCH = 1000
TRIALS = 4
TIMES = "step seconds/threads "
"""What the key of step times begins with, before their number of threads."""

_SHAMPOO: dict[str, Any] = {
    "betas": (0.9, 0.999),
    "grafting": "adam",
    "merge_dims": False,
    "head": "rule",
}
_OTHERS = {"fallback_lr": 1e-3, "head": "rule"}

METHODS: dict[str, Method] = {
    "Adam": Method("adam", 1e-3, {"fused": True}),
    "BlockAdam": Method("block_adam", 1e-3, _OTHERS),
    "Shampoo(250)": Method("shampoo", 1e-3, {**_SHAMPOO, "block_size": 250, "interval": 10}),
    "Shampoo(1000)": Method("shampoo", 1e-3, {**_SHAMPOO, "block_size": 1000, "interval": 10}),
    "Sketchy": Method(
        "sketchy",
        1e-3,
        {"rank": 32, "betas": (0.9, 0.999), "grafting": "adam", "interval": 10, "head": "rule"},
    ),
    # Its momentum sums updates where the others average them: ten times the step at the same rate.
    "SharedBasis": Method("shared_basis", 1e-4, _OTHERS),
}
TIMED_ALONE: dict[str, Method] = {
    "Shampoo(1000), roots every step": Method(
        "shampoo", 1e-3, {**_SHAMPOO, "block_size": 1000, "interval": 1}
    ),
}


def network() -> nn.Sequential:
    """Return the autoencoder; its last layer gives logits."""
    layers: list[nn.Module] = []
    for features, units in pairwise(SIZES):
        layers += [nn.Linear(features, units), nn.Tanh()]
    model = nn.Sequential(*layers[:-1])
    for layer in model:
        if isinstance(layer, nn.Linear):
            # With less, activations shrink from layer to layer, and all start on a long plateau.
            nn.init.xavier_uniform_(layer.weight, nn.init.calculate_gain("tanh"))
            nn.init.zeros_(layer.bias)
    return model


def image_loss(model: nn.Module, images: Tensor) -> Tensor:
    """Return the cross entropy summed over pixels, averaged over images."""
    total = binary_cross_entropy_with_logits(model(images), images, reduction="sum")
    return total / len(images)


def schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Return the paper's: a twentieth of warmup, then a line to zero."""
    warmup = max(1, steps // 20)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            (step + 1) / warmup
            if step < warmup
            else max(0.0, (steps - step) / max(1, steps - warmup))
        ),
    )


def train(
    make: Callable[[nn.Module], torch.optim.Optimizer],
    images: Tensor,
    *,
    planned: int,
    steps: int,
    seed: int,
) -> dict[str, Any]:
    """Train for ``steps`` of the ``planned`` ones.

    Returns:
        ``loss`` over 10,000 training images after the last step (None if it is not finite);
        ``curve``, the batch's loss every tenth step; ``state_bytes``.
    """
    torch.manual_seed(seed)
    model = network()
    optimizer = make(model)
    plan = schedule(optimizer, planned)
    order = batches(len(images), BATCH, torch.Generator().manual_seed(seed))
    curve = []
    for step in range(steps):
        loss = image_loss(model, images[next(order)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        plan.step()
        if step % 10 == 0:
            curve.append(round(float(loss.detach()), 3))
    with torch.no_grad():
        final = torch.stack([image_loss(model, part) for part in images[:10_000].split(1000)])
    return {
        "loss": float(final.mean()) if bool(torch.isfinite(final).all()) else None,
        "steps": steps,
        "curve": curve,
        "state_bytes": tensor_bytes(dict(optimizer.state)),
    }


def measure(images: Tensor, rounds: int, threads: int) -> dict[str, Any]:
    """Return the seconds of a step of each method: a mean over ten steps, which hold one root."""
    torch.set_num_threads(threads)
    found = {}
    for name, method in {**METHODS, **TIMED_ALONE}.items():
        torch.manual_seed(0)
        model = network()
        optimizer = method.make(model, 1e-4)
        turns = []
        count = 10 if name in METHODS else 3
        for turn in range(rounds + 1):
            start = clock.perf_counter()
            # Two steps of warmup; ten in a row hold one root, wherever they begin.
            for step in range(count if turn else 2):
                loss = image_loss(model, images[step * BATCH : (step + 1) * BATCH])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            if turn:
                turns.append((clock.perf_counter() - start) / count)
        found[name] = {"seconds": statistics.median(turns), "turns": turns}
        print(f"  {name:32}{found[name]['seconds']:8.3f} s", flush=True)
    return found


def main(
    time: bool = False,
    epochs: int = 2,
    search_steps: int = 40,
    seeds: int = 1,
    methods: tuple[str, ...] = tuple(METHODS),
    rounds: int = 1,
    threads: int = 1,
    out: Path = RESULTS / "autoencoder.json",
) -> None:
    """Train the autoencoder by every method, or time their steps.

    Args:
        time: Only measure step times.
        epochs: Passes over MNIST's 60,000 training images.
        search_steps: Steps of a run that looks for the learning rate.
        seeds: Runs at the best one.
        methods: Which methods.
        rounds: Turns of ten steps when timing.
        threads: Of torch.
        out: Where results are kept.
    """
    torch.set_num_threads(threads)
    # The images as they are, 0 to 1: the loader standardises them.
    inputs = load("mnist").train.inputs
    images = (inputs - inputs.min()) / (inputs.max() - inputs.min())
    results = Results(out, {"batch": BATCH, "trials": TRIALS, "sizes": SIZES})
    if time:
        results.runs[f"{TIMES}{threads}"] = measure(images, rounds, threads)
        results.save()
        return
    steps = epochs * (len(images) // BATCH)
    results.expect(len(methods) * (TRIALS * search_steps + seeds * steps))
    for name in methods:
        method = METHODS[name]

        def run(key: str, lr: float, count: int, seed: int, method: Method = method) -> float:
            result = results.run(
                key,
                lambda: train(
                    lambda model: method.make(model, lr),
                    images,
                    planned=steps,
                    steps=count,
                    seed=seed,
                ),
                cost=count,
            )
            return float("nan") if result["loss"] is None else -float(result["loss"])

        search = f"{name}/search, {search_steps} of {steps} steps"
        lr = tune(
            lambda lr: run(f"{search}/lr {lr:g}", lr, search_steps, 0),  # noqa: B023
            method.lr,
            trials=TRIALS,
        )
        for seed in range(seeds):
            run(f"{name}/{steps} steps/lr {lr:g}/seed {seed}", lr, steps, seed)


if __name__ == "__main__":
    tyro.cli(main)
