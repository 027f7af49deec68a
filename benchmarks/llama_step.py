"""What a training step of the small LLaMA costs with each method: milliseconds and memory.

Forward and backward are the same for all but NeuRMS, which reads its statistics there, and are
timed in turns. The step is the mean over as many steps as the low-rank methods' interval
holds, so that one renewal of their subspace is counted.

    python -m benchmarks.llama_step                # the scale of benchmarks.leads
    python -m benchmarks.llama_step --width 128 --layers 3 --heads 4 --batch 16 --context 128
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import neurms
from benchmarks.harness import RESULTS, Results
from benchmarks.language import Method, Scale, batch_of, loss_of
from benchmarks.leads import GROUPS
from benchmarks.llama import METHODS
from benchmarks.scales import BASE
from benchmarks.scales import METHODS as SCALED

AT_FULL_WIDTH = METHODS
AT_SMALL_WIDTH = {**SCALED, **GROUPS["methods"]}


class Runner:
    """One method with a model of its own."""

    def __init__(self, method: Method, scale: Scale) -> None:
        self.scale, self.method = scale, method
        self.model = scale.model(0)
        self.optimizer = method.make(self.model, 1e-4, 1e-4)
        self.generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(256, (100_000,), generator=self.generator, dtype=torch.uint8)

    def gradients(self) -> float:
        """Go forward and backward on random bytes; return milliseconds."""
        inputs, targets = batch_of(self.tokens, self.generator, self.scale)
        self.optimizer.zero_grad()
        start = time.perf_counter()
        loss_of(self.model, inputs, targets).backward()
        return 1e3 * (time.perf_counter() - start)

    def steps(self, count: int) -> float:
        """Return the mean milliseconds of steps on gradients that change from step to step."""
        drawn = [p.grad for p in self.model.parameters() if p.grad is not None]
        sizes = [grad.abs().mean() for grad in drawn]
        spent = 0.0
        for _ in range(count):
            for grad, size in zip(drawn, sizes, strict=True):
                grad.add_(torch.randn_like(grad) * size)
            start = time.perf_counter()
            self.optimizer.step()
            spent += time.perf_counter() - start
        return 1e3 * spent / count

    def memory(self) -> dict[str, int]:
        """Return the bytes of state, predicted and found after a step."""
        method = self.method
        fallback = {} if method.rule == "adamw" else {"fallback_lr": 1e-4}
        plan = neurms.memory_report(
            self.scale.model(0), method.rule, **{**method.settings, "lr": 1e-4, **fallback}
        )
        found = sum(
            value.numel() * value.element_size()
            for state in self.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        )
        return {"predicted_bytes": plan.state_bytes, "state_bytes": found}


def measured(scale: Scale, rounds: int, interval: int) -> dict[str, dict[str, Any]]:
    """Return milliseconds of a training step and bytes of state by method."""
    methods = AT_FULL_WIDTH if scale == Scale() else AT_SMALL_WIDTH
    runners = {name: Runner(method, scale) for name, method in methods.items()}
    tapped = [name for name, method in methods.items() if method.rule == "neurms"]
    passes: dict[str, list[float]] = {name: [] for name in ("adamw", *tapped)}
    for number in range(rounds + 2):
        for name in list(passes)[:: 1 if number % 2 else -1]:
            spent = runners[name].gradients()
            passes[name] += [spent] if number >= 2 else []
    result = {}
    for name, runner in runners.items():
        runner.gradients()
        gradients = statistics.median(passes.get(name, passes["adamw"]))
        runner.steps(2)
        step = runner.steps(interval)
        result[name] = {"gradients_ms": gradients, "step_ms": step, "ms": gradients + step}
        result[name] |= runner.memory()
    return result


def main() -> None:
    """Measure and keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    for name in ("width", "layers", "heads", "batch", "context"):
        parser.add_argument(f"--{name}", type=int, default=getattr(BASE, name))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9, help="of forward and backward")
    parser.add_argument("--interval", type=int, default=50, help="steps of the optimizer")
    parser.add_argument("--out", type=Path, default=RESULTS / "llama_step.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    scale = Scale(
        arguments.width, arguments.layers, arguments.heads, arguments.batch, arguments.context
    )
    settings = {"threads": arguments.threads, "rounds": arguments.rounds}
    record = Results(arguments.out, settings | {"interval": arguments.interval})
    record.run(str(scale), lambda: measured(scale, arguments.rounds, arguments.interval))


if __name__ == "__main__":
    main()
