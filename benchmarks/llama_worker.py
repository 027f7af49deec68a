"""One method with a model of its own, in a process of its own: what ``llama_cpu`` times in turns.

Reads one request a line, ``[what, how much]``, and answers with a line of JSON.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

import neurms
from benchmarks.language import Scale, batch_of, loss_of
from benchmarks.lora import adapt
from neurms.cli.environment import flush_denormals
from neurms.core.optimizers.plan import tensor_bytes

__all__ = ["ADAPTERS", "METHODS", "Worker", "answer"]

Method = tuple[str, dict[str, Any]]
_BACKWARD = {"update": "backward"}

METHODS: dict[str, Method] = {
    "AdamW fused": ("adamw", {"fused": True}),
    "SGD fused": ("sgd", {"fused": True}),
    "NeuRMS-U": ("neurms", {"variant": "U"}),
    "NeuRMS-U backward": ("neurms", {"variant": "U", **_BACKWARD}),
    "NeuRMS-P": ("neurms", {"variant": "P"}),
    "NeuRMS-P backward": ("neurms", {"variant": "P", **_BACKWARD}),
    "NeuRMS-P average": (
        "neurms",
        {"variant": "P", "moments": "average", "momentum": 0.8, "nesterov": True},
    ),
    "RACS": ("racs", {}),
    "RMNP": ("rmnp", {}),
    "Alice-0": ("alice", {"tracking": False}),
    "GaLore": ("galore", {}),
    "SharedBasis": ("shared_basis", {}),
    "Muon": ("muon", {}),
    "Muon 3 rounds": ("muon", {"steps": 3}),
    "Muon bf16": ("muon", {"precision": "bfloat16"}),
    "torch's Muon": ("torch muon", {}),
    "SOAP": ("soap", {}),
    "SOAP one basis": ("soap", {"max_preconditioned_dim": 1024}),
    "Shampoo": ("shampoo", {"interval": 20}),
}
"""By name: the rule and what differs from its defaults. SharedBasis's rank is 32, Alice-0's and
GaLore's 128 with an interval of 200, SOAP's interval 10. With one basis SOAP leaves the sides of
1,376 alone."""

ADAPTERS = {
    name: method
    for name, method in METHODS.items()
    if name not in ("Muon bf16", "Alice-0", "GaLore", "SharedBasis", "SOAP one basis")
}
"""Of fine-tuning: adapters are low-rank themselves, so that projecting them has no point."""


class TorchMuon:
    """Torch's own Muon on hidden matrices, and fused AdamW on the rest.

    Args:
        model: Its parameters without gradients are left alone.
    """

    def __init__(self, model: nn.Module) -> None:
        outside = {row.name for row in neurms.Muon(model).plan() if row.rule == "fallback"}
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        rest = [p for name, p in trained.items() if name in outside]
        hidden = [p for name, p in trained.items() if name not in outside]
        self.parts: list[torch.optim.Optimizer] = [torch.optim.Muon(hidden, lr=1e-4)]
        self.parts += [torch.optim.AdamW(rest, lr=1e-4, fused=True)] if rest else []

    def step(self) -> None:
        """Take both steps."""
        for part in self.parts:
            part.step()


class Worker:
    """A model under training.

    Args:
        method: Of :data:`METHODS`.
        scale: The model and its batch.
        low: Whether forward and backward run under autocast to bfloat16.
        rank: Of adapters, 0 to train the whole model.
    """

    def __init__(self, method: Method, scale: Scale, *, low: bool, rank: int) -> None:
        self.scale, self.low = scale, low
        self.model = adapt(scale.model(0), rank) if rank else scale.model(0)
        rule, settings = method
        if rule == "torch muon":
            self.optimizer: Any = TorchMuon(self.model)
            self.parts = self.optimizer.parts
        else:
            outside = {} if rule in ("adamw", "sgd") else {"fallback_lr": 1e-4}
            self.optimizer = neurms.create(rule, self.model, lr=1e-4, **outside, **settings)
            self.parts = [self.optimizer]
        self.generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(256, (100_000,), generator=self.generator, dtype=torch.uint8)
        self.asked: Mapping[str, Callable[[int], Any]] = {
            "train": lambda _: self.train(),
            "steps": self.steps,
            "memory": lambda _: self.memory(),
        }

    def train(self) -> list[float]:
        """Take a whole training step on random bytes.

        Returns:
            The milliseconds of forward and backward, and those of the optimizer's step.
        """
        inputs, targets = batch_of(self.tokens, self.generator, self.scale)
        self.model.zero_grad()
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.low):
            loss = loss_of(self.model, inputs, targets)
        loss.backward()
        middle = time.perf_counter()
        self.optimizer.step()
        return [1e3 * (middle - start), 1e3 * (time.perf_counter() - middle)]

    def steps(self, count: int) -> list[float]:
        """Return the milliseconds of steps on gradients that change from step to step."""
        drawn = [p.grad for p in self.model.parameters() if p.grad is not None]
        sizes = [float(grad.abs().mean()) for grad in drawn]
        noise = [torch.randn(grad.shape, generator=self.generator) for grad in drawn]
        spent = []
        for number in range(count):
            for grad, size, own in zip(drawn, sizes, noise, strict=True):
                # Rolled noise is another matrix, at a tenth of what it costs to draw one.
                grad.lerp_(own.roll(number * 131 + 1).mul_(size), 0.5)
            start = time.perf_counter()
            self.optimizer.step()
            spent.append(1e3 * (time.perf_counter() - start))
        return spent

    def memory(self) -> dict[str, int]:
        """Return the bytes of state, and the most that the process has held so far."""
        state = sum(tensor_bytes(dict(entry)) for own in self.parts for entry in own.state.values())
        gradients = sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"state_bytes": state, "gradient_bytes": gradients, "peak_bytes": peak}


def answer() -> None:
    """Answer requests until there are no more; the first describes the worker."""
    given = json.loads(sys.stdin.readline())
    torch.set_num_threads(given["threads"])
    flush_denormals()
    methods = ADAPTERS if given["rank"] else METHODS
    scale = Scale(**given["scale"])
    worker = Worker(methods[given["name"]], scale, low=given["low"], rank=given["rank"])
    for line in sys.stdin:
        what, count = json.loads(line)
        print(json.dumps(worker.asked[what](count)), flush=True)
