"""What the benchmarks on text share: the prose, a scale, a method, a training run."""

from __future__ import annotations

import lzma
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpt2_model import GPT2
from benchmarks.harness import Results
from benchmarks.llama_model import Llama
from benchmarks.own_rules import create

BOOKS = ("austen", "shakespeare_milton", "web_bible")
VALIDATION_BATCHES = 24
MOST_RATES = 6

Prose = tuple[Tensor, Tensor]
Watch = Callable[[int, nn.Module, torch.optim.Optimizer], dict[str, Any] | None]


@dataclass(frozen=True)
class Scale:
    """A model and how much text it sees in a step."""

    width: int = 128
    layers: int = 3
    heads: int = 4
    batch: int = 16
    context: int = 128
    kind: str = "llama"

    def model(self, seed: int) -> nn.Module:
        """Return the model with the weights of that seed."""
        torch.manual_seed(seed)
        made = {"llama": Llama, "gpt2": GPT2}[self.kind]
        return made(width=self.width, layers=self.layers, heads=self.heads, context=self.context)

    def __str__(self) -> str:
        return f"w{self.width} l{self.layers} b{self.batch} c{self.context}"


@dataclass(frozen=True)
class Method:
    """An optimizer's name, its settings and the learning rates to begin with, ascending."""

    rule: str
    rates: tuple[float, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    warmup: float = 0.1

    def make(self, model: nn.Module, lr: float, fallback_lr: float) -> torch.optim.Optimizer:
        """Return the optimizer; what is outside its rule goes to AdamW at ``fallback_lr``."""
        settings = dict(self.settings, lr=lr)
        if self.rule not in ("adamw", "sgd"):
            settings = {"fallback_lr": fallback_lr, "fallback_betas": (0.9, 0.95)} | settings
        return create(self.rule, model, **settings)


def recorded(methods: Mapping[str, Method]) -> dict[str, Any]:
    """Return the settings of methods as they go into a results file."""
    return {
        name: {k: v for k, v in asdict(m).items() if k != "rates"} for name, m in methods.items()
    }


def prose() -> Prose:
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


def bytes_per_word(tokens: Tensor) -> float:
    """Return how many bytes of text, spaces included, go to one word."""
    text = bytes(tokens.tolist())
    return len(text) / len(text.split())


def batch_of(tokens: Tensor, generator: torch.Generator, scale: Scale) -> tuple[Tensor, Tensor]:
    """Draw inputs and next-byte targets, both (batch, context)."""
    length = scale.context + 1
    starts = torch.randint(len(tokens) - length, (scale.batch,), generator=generator)
    windows = torch.stack([tokens[s : s + length] for s in starts.tolist()]).long()
    return windows[:, :-1], windows[:, 1:]


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats per byte."""
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


@torch.no_grad()
def validate(model: nn.Module, held_out: Tensor, scale: Scale) -> float:
    """Return the validation loss over the same 24 batches every time."""
    # Batches of 16 windows whatever the scale, so that scales are validated equally well.
    fixed = Scale(batch=16, context=scale.context)
    generator = torch.Generator().manual_seed(1234)
    return statistics.fmean(
        loss_of(model, *batch_of(held_out, generator, fixed)).item()
        for _ in range(VALIDATION_BATCHES)
    )


def train(
    data: Prose,
    scale: Scale,
    method: Method,
    lr: float,
    seed: int,
    steps: int,
    fallback_lr: float,
    *,
    every: int = 50,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Train once; return the validation curve [(step, loss, seconds in training)].

    A run that leaves the finite numbers ends there and says ``diverged``. What ``watch`` returns
    after a step goes to ``watched``.
    """
    model = scale.model(seed)
    optimizer = method.make(model, lr, fallback_lr)
    warmup = max(1, round(steps * method.warmup))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: _cosine(t, warmup, steps))
    generator = torch.Generator().manual_seed(10_000 + seed)
    result: dict[str, Any] = {"curve": []}
    seconds = 0.0
    for step in range(1, steps + 1):
        inputs, targets = batch_of(data[0], generator, scale)
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = loss_of(model, inputs, targets)
        loss.backward()
        if not math.isfinite(loss.item()):
            return result | {"diverged": step}
        optimizer.step()
        schedule.step()
        seconds += time.perf_counter() - start
        if watch is not None and (seen := watch(step, model, optimizer)) is not None:
            result.setdefault("watched", []).append({"step": step} | seen)
        if step == steps or (every and step % every == 0):
            result["curve"].append((step, validate(model, data[1], scale), seconds))
    return result


def _cosine(step: int, warmup: int, steps: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def final(run: Mapping[str, Any]) -> float:
    """Return the last validation loss, infinite for a run that diverged."""
    if "diverged" in run or not math.isfinite(run["curve"][-1][1]):
        return math.inf
    return float(run["curve"][-1][1])


def tuned(rates: Sequence[float], loss_at: Callable[[float], float]) -> float:
    """Return the best rate: of ``rates``, and beyond while the best is the outermost.

    The budget is the same for every method: :data:`MOST_RATES` trials. Steps beyond the ends are
    those between the last two rates.
    """
    tried = {lr: loss_at(lr) for lr in rates}
    while len(tried) < MOST_RATES:
        best, known = min(tried, key=tried.__getitem__), sorted(tried)
        if best == known[-1]:
            following = best * best / known[-2]
        elif best == known[0]:
            following = best * best / known[1]
        else:
            break
        following = float(f"{following:.3g}")
        tried[following] = loss_at(following)
    return min(tried, key=tried.__getitem__)


def tune(
    record: Results,
    data: Prose,
    scale: Scale,
    name: str,
    method: Method,
    steps: int,
    fallback_lr: float,
    prefix: str = "",
) -> float:
    """Return a method's best rate after ``steps`` steps with seed 0."""

    def loss_at(lr: float) -> float:
        key = f"{prefix}tune {name} lr={lr:g} steps={steps}"
        return final(
            record.run(key, lambda: train(data, scale, method, lr, 0, steps, fallback_lr, every=0))
        )

    return tuned(method.rates, loss_at)
