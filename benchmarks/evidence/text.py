"""Byte-level language models on prose: three parts of every book, one for each purpose."""

from __future__ import annotations

import json
import lzma
import math
import os
import statistics
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.evidence.design import NETWORK_SEEDS, Design
from benchmarks.harness import RESULTS
from benchmarks.language import BOOKS, Scale, batch_of, loss_of
from benchmarks.vision import schedule
from neurms.core.ground.errors import NonFiniteError
from neurms.core.optimizers.plan import tensor_bytes

__all__ = [
    "SCALES",
    "TASKS",
    "TIMED",
    "TIMED_ROWS",
    "TIMES",
    "Text",
    "split",
    "stepped",
    "timed",
]

PARTS = ("train", "validation", "test")
BATCHES = {"validation": 24, "test": 72}
"""Batches of 16 windows that a loss is measured on, the same ones every time."""

CURVE = 6
"""Into how many parts the validation losses of a reported run divide it."""


def split(text: bytes) -> dict[str, Tensor]:
    """Return the first 18 twentieths for training, one for choosing and one for reporting."""
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    first, second = len(tokens) * 18 // 20, len(tokens) * 19 // 20
    return dict(zip(PARTS, (tokens[:first], tokens[first:second], tokens[second:]), strict=True))


def prose() -> dict[str, Tensor]:
    """Return the bytes of all books by part."""
    folder = os.environ.get("NEURMS_DATA")
    if folder is None:
        raise SystemExit("error: set NEURMS_DATA to the folder that holds austen.txt.xz")
    books = [split(lzma.decompress((Path(folder) / f"{b}.txt.xz").read_bytes())) for b in BOOKS]
    return {part: torch.cat([book[part] for book in books]) for part in PARTS}


class Text:
    """A small LLaMA for some steps.

    Args:
        name: Of the task.
        scale: The model and how much it sees in a step.
        steps: Of every reported run.
        trials: Of every search.
        search_steps: Of a search's runs, if they are shorter; the schedule is, too.
    """

    def __init__(
        self, name: str, scale: Scale, steps: int, trials: int, search_steps: int | None = None
    ) -> None:
        self.scale, self.steps, self.search_steps = scale, steps, search_steps or steps
        details = {**asdict(scale), "steps": steps, "schedule": "warmup of a tenth, cosine to 0"}
        if search_steps is not None:
            details["steps of a search's runs"] = search_steps
        self.design = Design(
            name, "loss, nats per byte", "lower", 0.02, trials, NETWORK_SEEDS, details
        )
        self._parts: dict[str, Tensor] = {}

    def train(
        self, make: Callable[[nn.Module], torch.optim.Optimizer], seed: int, *, reported: bool
    ) -> dict[str, Any]:
        """Train once; a run that leaves the finite numbers has the loss None."""
        self._parts = self._parts or prose()
        part = "test" if reported else "validation"
        model = self.scale.model(seed)
        optimizer = make(model)
        steps = self.steps if reported else self.search_steps
        plan = schedule(optimizer, steps)
        generator = torch.Generator().manual_seed(10_000 + seed)
        curve = []
        for step in range(1, steps + 1):
            inputs, targets = batch_of(self._parts["train"], generator, self.scale)
            optimizer.zero_grad()
            loss = loss_of(model, inputs, targets)
            loss.backward()
            if not math.isfinite(loss.item()) or not stepped(optimizer):
                return {part: None, "diverged": step}
            plan.step()
            if reported and step % (steps // CURVE) == 0 and step < steps:
                curve.append((step, round(self.loss(model, "validation"), 5)))
        found = self.loss(model, part)
        measured: dict[str, Any] = {part: found if math.isfinite(found) else None}
        if reported:
            state = tensor_bytes(dict(optimizer.state))
            measured |= {"curve": curve, "state_bytes": state, "steps": steps}
        return measured

    @torch.no_grad()
    def loss(self, model: nn.Module, part: str) -> float:
        """Return the mean loss over a part's fixed batches."""
        fixed = Scale(batch=16, context=self.scale.context)
        generator = torch.Generator().manual_seed(1234)
        return statistics.fmean(
            loss_of(model, *batch_of(self._parts[part], generator, fixed)).item()
            for _ in range(BATCHES[part])
        )


def stepped(optimizer: torch.optim.Optimizer) -> bool:
    """Take a step; return False where the optimizer has found a gradient that is not finite."""
    try:
        optimizer.step()
    except NonFiniteError:
        return False
    return True


SCALES = {
    "text-64": Scale(width=64, layers=2, heads=2, batch=8, context=64),
    "text-128": Scale(),
}
"""The models."""

STEPS = {"text-64": 300, "text-128": 600}

TASKS = {
    "text-64": lambda: Text("text-64", SCALES["text-64"], STEPS["text-64"], 16),
    "text-64-long": lambda: Text("text-64-long", SCALES["text-64"], 5000, 8, search_steps=1000),
    "text-128": lambda: Text("text-128", SCALES["text-128"], STEPS["text-128"], 8),
}
"""The tasks on text by name, equally long in steps."""

TIMED = {"text-64-timed": "text-64"}
"""The tasks in which every row trains for the time that AdamW's steps take: name -> the other's."""

TIMED_ROWS = (
    "AdamW",
    "AdamW, two rates",
    "RACS",
    "P",
    "P momentum",
    "P average",
    "RMNP",
    "Muon",
    "Muon 3 rounds",
)

TIMES = RESULTS / "contest_step_text.json"
"""What a step of each takes, from ``neurms bench contest_step --task text``."""


def timed(task: str, row: str) -> Text:
    """Return what a row trains where all train for the same time.

    Args:
        task: One of :data:`TIMED`.
        row: One of :data:`TIMED_ROWS`.
    """
    name = TIMED[task]
    runs = json.loads(TIMES.read_text())["runs"] if TIMES.is_file() else {}
    if row not in runs.get(name, {}):
        raise SystemExit(
            f"error: {TIMES} has no time of {row!r} on {name}; run neurms bench contest_step "
            "--task text first"
        )
    steps = round(STEPS[name] / runs[name][row]["ratio"])
    made = Text(task, SCALES[name], steps, 8)
    rest = {key: value for key, value in made.design.details.items() if key != "steps"}
    details = {**rest, "time": f"of AdamW's {STEPS[name]} steps"}
    made.design = replace(made.design, details=details)
    return made
