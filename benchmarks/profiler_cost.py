"""Whether the profiler's times are right, follow the cost law, and cost nothing when it looks away.

    OMP_NUM_THREADS=1 python -m benchmarks.profiler_cost

Per width: what the profiler charges to reductions and scale factors in the steps that it looks at,
beside a plain clock around the same kernels; the overhead's fit a / min(m, n); and the time of a
step with a profiler that is attached but does not look over that of a step without one, in turns.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import neurms
from benchmarks.harness import RESULTS, Results
from neurms.callbacks.profiler.clock import OWN
from neurms.core.structures.unit_feature import UnitFeatureDiagonal
from neurms.core.taps import activity

WIDTHS = (128, 256, 512, 1024)
ROWS = 2048


def network(width: int) -> tuple[nn.Module, neurms.NeuRMS]:
    torch.manual_seed(0)
    layers = [nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)]
    model = nn.Sequential(*layers, nn.Tanh(), nn.Linear(width, width))
    return model, neurms.NeuRMS(model, variant="F", lr=1e-4)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor) -> None:
    model(inputs).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


class Outside:
    """A plain clock around the kernels, where a training calls them, with caches as they then are.

    It stands in for the functions that reduce a signal, move the averages and form the factors. The
    profiler's own reductions are not its business.
    """

    def __init__(self) -> None:
        self.profiler: Any = None
        self.timed: list[float] = []
        self.between: list[float] = []
        self._spent = 0.0

    def timing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function`` with the clock around it."""

        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter_ns()
            result = function(*arguments, **named)
            spent = (time.perf_counter_ns() - start) / 1e3
            watch = self.profiler._stopwatch
            stack = watch._stack() if watch is not None else []
            if not any(span.kind == OWN for span in stack):
                self._spent += spent
            return result

        return timed

    def close(self, times: list[float]) -> None:
        """End a step."""
        times.append(self._spent)
        self._spent = 0.0


def measured(width: int) -> dict[str, Any]:
    """Return the sum over three equal layers of what the profiler and the outer clock say."""
    model, optimizer = network(width)
    inputs, outside = torch.randn(ROWS, width), Outside()
    steps = 120 if width <= 256 else 50
    with ExitStack() as stack:
        for place, name in (
            (activity, "_square_sum"),
            (UnitFeatureDiagonal, "observe"),
            (UnitFeatureDiagonal, "factors"),
        ):
            timed = outside.timing(getattr(place, name))
            stack.enter_context(mock.patch.object(place, name, timed))
        profiler = neurms.profile(model, optimizer, every_n_steps=4, warmup_steps=10)
        outside.profiler = profiler
        stack.enter_context(profiler)
        for _ in range(steps):
            looking, timing = profiler.looking, profiler.timing
            step(model, optimizer, inputs)
            outside.close(outside.timed if timing else [] if looking else outside.between)
    report = profiler.report()
    inside = [
        sum(layer["reduce_us"] + layer["scale_us"] for layer in sample["layers"].values())
        for sample in report.run.samples
    ]
    # The last timed step may have had no statistics after it.
    ratios = [a / b for a, b in zip(inside, outside.timed, strict=False)]
    return {
        "width": width,
        "inside_us": statistics.median(inside),
        "outside_us": statistics.median(outside.timed),
        "inside_over_outside": statistics.median(ratios),
        # A layer has four spans; beside kernels they hold what calls and adds up.
        "besides_kernels_us_per_span": (
            statistics.median(inside) - statistics.median(outside.timed)
        )
        / (4 * len(report)),
        "outside_between_us": statistics.median(outside.between[10:]),
        "overhead": report.overhead,
        "predicted_overhead": report[0].predicted_overhead,
        "layer_us": statistics.fmean(row.total_us for row in report),
        "profiler_ms": report.profiler_ms,
        "step_ms": report.step_ms,
    }


def looking_away(width: int, rounds: int = 600, *, control: bool = False) -> dict[str, float]:
    """Compare steps under an attached profiler that never looks with steps without one, in turns.

    In processor time, which other work on the machine does not lengthen. The control has no
    profiler on either side and shows what the comparison itself is worth. ``hook_us`` is all that
    runs in a step that is not looked at, timed by itself.
    """
    pairs = [network(width), network(width)]
    inputs = torch.randn(256, width)
    never: dict[str, Any] = {"every_n_steps": 10**9, "warmup_steps": 10**9}
    times: list[list[float]] = [[], []]
    profiler = neurms.profile(*pairs[0], **never)
    with nullcontext() if control else profiler:
        for turn in range(rounds):
            for which in (0, 1) if turn % 2 else (1, 0):
                start = time.process_time_ns()
                step(*pairs[which], inputs)
                times[which].append((time.process_time_ns() - start) / 1e3)
    ratios = [a / b for a, b in zip(*times, strict=True)][rounds // 10 :]
    return {
        "width": width,
        "step_us": statistics.median(times[1]),
        "ratio_of_medians": statistics.median(times[0]) / statistics.median(times[1]),
        "median_of_ratios": statistics.median(ratios),
        "hook_us": hook_us(profiler, pairs[0][1]),
    }


def hook_us(profiler: Any, optimizer: torch.optim.Optimizer, calls: int = 100_000) -> float:
    with profiler:
        start = time.process_time_ns()
        for _ in range(calls):
            profiler._after_step(optimizer, (), {})
        return (time.process_time_ns() - start) / calls / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    arguments = parser.parse_args()
    settings = {"rows": ROWS, "threads": torch.get_num_threads()}
    record = Results(RESULTS / "profiler_cost.json", settings)
    found = [record.run(f"width {w}", lambda w=w: measured(w)) for w in arguments.widths]
    for width in (64, 256):
        record.run(f"looking away {width}", lambda w=width: looking_away(w))
        record.run(f"control {width}", lambda w=width: looking_away(w, control=True))
    xs = [math.log(run["width"]) for run in found]
    ys = [math.log(run["overhead"]) for run in found]
    mean_x, mean_y = statistics.fmean(xs), statistics.fmean(ys)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    slope /= sum((x - mean_x) ** 2 for x in xs)
    wide = [run for run in found if run["width"] >= 256]
    law = {"slope": slope, "times_width": [run["overhead"] * run["width"] for run in wide]}
    record.save(law=law)
    print(f"overhead ~ width^{slope:.2f}; overhead x width: {law['times_width']}")


if __name__ == "__main__":
    main()
