"""Tags of ancient Greek: the treebank's development part chooses, its test part reports."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.evidence.design import NETWORK_SEEDS, Design
from benchmarks.evidence.text import stepped
from benchmarks.tagger import BUCKETS, LAYERS, WIDTH, WINDOW, Tagger, Text, accuracy, encode, read
from benchmarks.vision import schedule
from neurms.core.optimizers.plan import tensor_bytes

__all__ = ["TASKS", "Tags"]

BATCH, STEPS, TRIALS = 16, 160, 8
FILES = {"train": "train", "validation": "dev", "test": "test"}


class Tags:
    """A small Transformer that tags words, for some steps."""

    def __init__(self) -> None:
        details = {
            "width": WIDTH,
            "layers": LAYERS,
            "hidden": 4 * WIDTH,
            "buckets": ", ".join(map(str, BUCKETS)),
            "batch": BATCH,
            "window": WINDOW,
            "steps": STEPS,
            "schedule": "warmup of a tenth, cosine to 0",
        }
        self.design = Design("tags", "accuracy", "higher", 0.002, TRIALS, NETWORK_SEEDS, details)
        self._text: dict[str, Text] = {}
        self._tags = 0

    def train(
        self, make: Callable[[nn.Module], torch.optim.Optimizer], seed: int, *, reported: bool
    ) -> dict[str, Any]:
        """Train once; a run that leaves the finite numbers has the accuracy None in a search."""
        part = "test" if reported else "validation"
        self._read()
        (words, labels), judging = self._text["train"], self._text[part]
        torch.manual_seed(seed)
        model = Tagger(self._tags)
        optimizer = make(model)
        plan = schedule(optimizer, STEPS)
        generator = torch.Generator().manual_seed(10_000 + seed)
        for step in range(1, STEPS + 1):
            chosen = torch.randint(len(words), (BATCH,), generator=generator)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(words[chosen]).flatten(0, 1), labels[chosen].flatten())
            loss.backward()
            if not math.isfinite(loss.item()) or not stepped(optimizer):
                return {part: accuracy(model, judging) if reported else None, "diverged": step}
            plan.step()
        state = {"state_bytes": tensor_bytes(dict(optimizer.state))} if reported else {}
        return {part: accuracy(model, judging), "steps": STEPS, **state}

    def _read(self) -> None:
        if self._text:
            return
        pairs = {part: read(name) for part, name in FILES.items()}
        tags = {tag: i for i, tag in enumerate(sorted({tag for _, tag in pairs["train"]}))}
        self._text = {part: encode(own, tags) for part, own in pairs.items()}
        self._tags = len(tags)


TASKS = {"tags": Tags}
"""The task by name."""
