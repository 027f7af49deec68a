"""Whether the profiler's times are right, follow the cost law, and cost nothing when it looks away.

    neurms bench profiler_cost

Per width: what the profiler charges to reductions and scale factors in the steps that it looks at,
beside a plain clock around the same kernels, in those steps and in the ones between; the fitted
law of the report's shares; and the time of a step with a profiler that is attached but does not
look over that of a step without one, in turns.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import neurms
from benchmarks.harness import RESULTS, Results
from benchmarks.laws import exponent
from neurms.compiled.backends import PROMPT
from neurms.compiled.moments import ema_, moment_factors, move_moments
from neurms.compiled.reductions import column_square_sum
from neurms.compiled.signals import scaled_signal

WIDTHS = (64, 128, 256, 512, 1024)
ROWS = 2048


def network(width: int, update: Any = "step") -> tuple[nn.Module, neurms.NeuRMS]:
    torch.manual_seed(0)
    layers = [nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)]
    model = nn.Sequential(*layers, nn.Tanh(), nn.Linear(width, width))
    return model, neurms.NeuRMS(model, variant="F", lr=1e-4, update=update)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor) -> None:
    model(inputs).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


class Outside:
    """A plain clock around the kernels, where a training calls them, with caches as they then are.

    It knows nothing of spans: it stands in for the compiled functions that sum up signals, move
    averages and form or apply factors, in every step, looked at or not.
    """

    KERNELS = (column_square_sum, ema_, moment_factors, move_moments, scaled_signal)

    def __init__(self) -> None:
        self.timed: list[float] = []
        self.between: list[float] = []
        self.calls = 0
        self._spent = 0.0

    def patches(self) -> list[Any]:
        """Return context managers that put the clock around the kernels."""
        return [
            mock.patch.dict(kernel._forms, {form: self._timing(kernel.on(form))})
            for kernel in self.KERNELS
            for form in ("auto", PROMPT)
        ]

    def _timing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter_ns()
            result = function(*arguments, **named)
            self._spent += (time.perf_counter_ns() - start) / 1e3
            self.calls += 1
            return result

        return timed

    def close(self, times: list[float]) -> None:
        """End a step."""
        times.append(self._spent)
        self._spent, self.calls = 0.0, 0


def measured(width: int, update: str) -> dict[str, Any]:
    """Return the sum over three equal layers of what the profiler and the outer clock say."""
    model, optimizer = network(width, update)
    inputs, outside = torch.randn(ROWS, width), Outside()
    steps = 120 if width <= 256 else 60 if width <= 512 else 34
    settings: dict[str, Any] = {"every_n_steps": 4, "warmup_steps": 6, "max_elements": 2**14}
    calls = 0
    with ExitStack() as stack:
        for patch in outside.patches():
            stack.enter_context(patch)
        profiler = stack.enter_context(neurms.profile(model, optimizer, **settings))
        for _ in range(steps):
            looking, timing = profiler.looking, profiler.timing
            step(model, optimizer, inputs)
            calls = calls if looking else outside.calls
            outside.close(outside.timed if timing else [] if looking else outside.between)
    report = profiler.report()
    inside = [
        sum(layer["reduce_us"] + layer["scale_us"] for layer in sample["layers"].values())
        for sample in report.run.samples
    ]
    # The last timed step may have had no statistics after it.
    ratios = [a / b for a, b in zip(inside, outside.timed, strict=False)]
    between = statistics.median(outside.between[5:])
    return {
        "width": width,
        "update": update,
        "inside_us": statistics.median(inside),
        "outside_us": statistics.median(outside.timed),
        "inside_over_outside": statistics.median(ratios),
        "outside_between_us": between,
        "inside_over_between": statistics.median(inside) / between,
        "kernel_calls": calls,
        "overhead": report.overhead,
        "overhead_with_bookkeeping": report.overhead_with_bookkeeping,
        "predicted_overhead": report[0].predicted_overhead,
        "layer_us": statistics.fmean(row.total_us for row in report),
        "bookkeeping_us": statistics.fmean(row.bookkeeping_us for row in report),
        "optimizer_bookkeeping_us": report.bookkeeping_us,
        "profiler_ms": report.profiler_ms,
        "step_ms": report.step_ms,
    }


def looking_away(width: int, rounds: int = 300, *, control: bool = False) -> dict[str, float]:
    """Compare steps under an attached profiler that never looks with steps without one, in turns.

    In processor time, which other work on the machine does not lengthen. Each of two equal networks
    has the profiler for half of the rounds, so that where their memory lies does not count. The
    control has no profiler on either side and shows what the comparison itself is worth.
    ``hook_us`` is all that runs in a step that is not looked at, timed by itself.
    """
    pairs = [network(width), network(width)]
    inputs = torch.randn(256, width)
    never: dict[str, Any] = {"every_n_steps": 10**9, "warmup_steps": 10**9}
    warnings.filterwarnings("ignore", "the profile is empty")
    ratios: list[float] = []
    medians = []
    for watched in (0, 1):
        profiler = neurms.profile(*pairs[watched], **never)
        times: list[list[float]] = [[], []]
        with nullcontext() if control else profiler:
            for turn in range(rounds):
                for which in (0, 1) if turn % 2 else (1, 0):
                    start = time.process_time_ns()
                    step(*pairs[which], inputs)
                    times[which].append((time.process_time_ns() - start) / 1e3)
        pair = [times[watched][rounds // 10 :], times[1 - watched][rounds // 10 :]]
        medians.append([statistics.median(side) for side in pair])
        ratios.append(statistics.median(a / b for a, b in zip(*pair, strict=True)))
    return {
        "width": width,
        "step_us": statistics.fmean(without for _, without in medians),
        "ratio_of_medians": statistics.geometric_mean(a / b for a, b in medians),
        "median_of_ratios": statistics.geometric_mean(ratios),
        "hook_us": hook_us(profiler, pairs[1][1]),
    }


def hook_us(profiler: Any, optimizer: torch.optim.Optimizer, calls: int = 100_000) -> float:
    with profiler:
        start = time.process_time_ns()
        for _ in range(calls):
            profiler._after_step(optimizer, (), {})
        return (time.process_time_ns() - start) / calls / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "profiler_cost.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    record = Results(arguments.out, {"rows": ROWS, "threads": arguments.threads})
    for width, update in itertools.product(arguments.widths, ("step", "backward")):
        record.run(f"width {width}, {update}", partial(measured, width, update))
    for width in (64, 256):
        record.run(f"looking away {width}", partial(looking_away, width))
        record.run(f"control {width}", partial(looking_away, width, control=True))
    laws = {}
    for update in ("step", "backward"):
        own = [run for run in record.runs.values() if run.get("update") == update]
        for key in ("overhead", "overhead_with_bookkeeping"):
            laws[f"{key}, {update}"] = exponent(own, key)
    record.save(laws=laws)
    for name, law in laws.items():
        if law is not None:
            print(f"{name} ~ width^{law['k']:.2f} ({law['low']:.2f} .. {law['high']:.2f})")


if __name__ == "__main__":
    main()
