"""A small LLaMA on English prose: which optimizer needs how many steps, and how many seconds.

Every optimizer gets the same budget: the same number of learning rates, tried for the same number
of steps with the same seed, then the same seeds at the best rate. Parameters outside the rule
(embedding, head, norms) go to AdamW at the rate that was best for AdamW alone.

    NEURMS_DATA=... python -m benchmarks.llama                 # the table in docs, resumable
    NEURMS_DATA=... python -m benchmarks.llama --only racs     # one optimizer
"""

from __future__ import annotations

import argparse
import lzma
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import neurms
from benchmarks.harness import RESULTS, Results
from benchmarks.llama_model import Llama

BOOKS = ("austen", "shakespeare_milton", "web_bible")
BATCH, CONTEXT = 16, 128

# Four rates for each, a factor of two (SharedBasis: three) apart.
RATES: dict[str, tuple[float, ...]] = {
    "adamw": (2e-3, 4e-3, 8e-3, 16e-3),
    "racs": (0.02, 0.04, 0.08, 0.16),
    "rmnp": (0.0025, 0.005, 0.01, 0.02),
    "rmnp-momentum.8": (0.0025, 0.005, 0.01, 0.02),
    "alice": (0.01, 0.02, 0.04, 0.08),
    "muon": (0.01, 0.02, 0.04, 0.08),
    "shared_basis": (1e-4, 3e-4, 1e-3, 3e-3),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "adamw": {"betas": (0.9, 0.95), "weight_decay": 0.0},
    "muon": {"weight_decay": 0.0},
    "rmnp-momentum.8": {"momentum": 0.8},
    "alice": {"rank": 32, "leading": 10, "interval": 50},
    "shared_basis": {"rank": 16},
}


def prose() -> tuple[Tensor, Tensor]:
    """Return training and validation bytes: of each book the last twentieth is held out."""
    folder = os.environ.get("NEURMS_DATA")
    if folder is None:
        raise SystemExit("set NEURMS_DATA to the folder that holds austen.txt.xz and its like")
    train, held_out = [], []
    for book in BOOKS:
        with lzma.open(Path(folder) / f"{book}.txt.xz") as file:
            text = file.read()
        tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        cut = len(tokens) * 19 // 20
        train.append(tokens[:cut])
        held_out.append(tokens[cut:])
    return torch.cat(train), torch.cat(held_out)


def batch_of(tokens: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw inputs and next-byte targets, both (BATCH, CONTEXT)."""
    starts = torch.randint(len(tokens) - CONTEXT - 1, (BATCH,), generator=generator)
    windows = torch.stack([tokens[s : s + CONTEXT + 1] for s in starts.tolist()]).long()
    return windows[:, :-1], windows[:, 1:]


def loss_of(model: Llama, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats per byte."""
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


@torch.no_grad()
def validate(model: Llama, held_out: Tensor) -> float:
    """Return the validation loss over the same 24 batches every time."""
    generator = torch.Generator().manual_seed(1234)
    losses = [loss_of(model, *batch_of(held_out, generator)).item() for _ in range(24)]
    return statistics.fmean(losses)


def train(
    data: tuple[Tensor, Tensor], name: str, lr: float, seed: int, steps: int, fallback_lr: float
) -> dict[str, Any]:
    """Train once; return the validation curve [(step, loss, seconds in training)]."""
    torch.manual_seed(seed)
    model = Llama(context=CONTEXT)
    settings = dict(SETTINGS.get(name, {}), lr=lr)
    if name != "adamw":
        settings |= {"fallback_lr": fallback_lr, "fallback_betas": (0.9, 0.95)}
    optimizer = neurms.create(name.partition("-")[0], model, **settings)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: _cosine(t, warmup, steps))
    generator = torch.Generator().manual_seed(10_000 + seed)
    curve, seconds = [], 0.0
    for step in range(1, steps + 1):
        inputs, targets = batch_of(data[0], generator)
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = loss_of(model, inputs, targets)
        loss.backward()
        if not math.isfinite(loss.item()):
            return {"curve": curve, "diverged": step}
        optimizer.step()
        schedule.step()
        seconds += time.perf_counter() - start
        if step % 25 == 0 or step == steps:
            curve.append((step, validate(model, data[1]), seconds))
    return {"curve": curve}


def _cosine(step: int, warmup: int, steps: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def final(run: dict[str, Any]) -> float:
    """Return the last validation loss, infinite for a diverged run."""
    return math.inf if "diverged" in run else run["curve"][-1][1]


def tuned(record: Results, data: Any, name: str, steps: int, fallback_lr: float) -> float:
    """Return the best rate of :data:`RATES` after ``steps`` steps with seed 0."""
    losses = {}
    for lr in RATES[name]:
        key = f"tune {name} lr={lr:g} steps={steps}"
        losses[lr] = final(
            record.run(key, lambda lr=lr: train(data, name, lr, 0, steps, fallback_lr))
        )
    return min(losses, key=losses.__getitem__)


def rows(runs: dict[str, Any], steps: int) -> list[dict[str, Any]]:
    """Return, for each optimizer, its final loss and what it needs to reach AdamW's.

    ``step_ratio`` is AdamW's steps over the optimizer's to AdamW's final loss; ``throughput`` is
    the papers' effective throughput, AdamW's tokens over the optimizer's seconds to that loss,
    relative to AdamW's own. Both are None where that loss was not reached.
    """
    by_name: dict[str, list[Any]] = {}
    for key, run in runs.items():
        kind, name, lr, *_ = key.replace("lr=", "").split()
        if kind == "final" and key.endswith(f"steps={steps}") and lr == _best(runs, name):
            by_name.setdefault(name, []).append((lr, run))
    target = statistics.fmean(final(run) for _, run in by_name["adamw"])
    reference = statistics.fmean(run["curve"][-1][2] for _, run in by_name["adamw"])
    table = []
    for name, own in by_name.items():
        losses = [final(run) for _, run in own]
        reached = _first_below([run for _, run in own], target)
        table.append(
            {
                "optimizer": name,
                "lr": own[0][0],
                "seeds": len(own),
                "loss": statistics.fmean(losses),
                "std": statistics.stdev(losses) if len(losses) > 1 else None,
                "seconds": statistics.fmean(run["curve"][-1][2] for _, run in own),
                "step_ratio": steps / reached[0] if reached else None,
                "throughput": reference / reached[1] if reached else None,
            }
        )
    return table


def _best(runs: dict[str, Any], name: str) -> str:
    """Return the tuned rate as written in the keys."""
    tuning = {key: final(run) for key, run in runs.items() if key.startswith(f"tune {name} ")}
    return min(tuning, key=tuning.__getitem__).split("lr=")[1].split()[0]


def _first_below(runs: list[Any], target: float) -> tuple[int, float] | None:
    """Return (step, seconds) at which the mean curve first is at or below ``target``."""
    for points in zip(*(run["curve"] for run in runs), strict=False):
        if statistics.fmean(point[1] for point in points) <= target:
            return points[0][0], statistics.fmean(point[2] for point in points)
    return None


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=600, help="steps of the final runs")
    parser.add_argument("--tune-steps", type=int, default=200, help="steps of a tuning run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default=",".join(RATES), help="optimizers, by comma")
    parser.add_argument("--out", type=Path, default=RESULTS / "llama.json")
    arguments = parser.parse_args()
    settings = {"batch": BATCH, "context": CONTEXT, "optimizers": SETTINGS}
    record, data = Results(arguments.out, settings), prose()
    fallback_lr = tuned(record, data, "adamw", arguments.tune_steps, 0.0)
    for seed in range(arguments.seeds):
        for name in arguments.only.split(","):
            lr = tuned(record, data, name, arguments.tune_steps, fallback_lr)
            key = f"final {name} lr={lr:g} seed={seed} steps={arguments.steps}"
            record.run(
                key, lambda n=name, r=lr, s=seed: train(data, n, r, s, arguments.steps, fallback_lr)
            )
    for row in rows(record.runs, arguments.steps):
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})


if __name__ == "__main__":
    main()
