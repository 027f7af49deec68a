"""What reductions and scalings cost beside a layer's products, over widths, batches and threads.

    neurms bench overhead                     # every combination that the file does not hold yet
    neurms bench overhead --seconds 50        # as many as fit, the rest the next time
    neurms bench overhead --variant P         # variant P's, in a file of their own

Two equal linear layers with a ReLU between, under NeuRMS; the second one's times, from the
same spans that the profiler reports, without its statistics. F's ``step`` scales in the
optimizer's pass over the weight; ``backward`` scales D and H and writes their product into the
weight; ``backward bf16`` multiplies them in bfloat16 and scales the sums on their way, which counts
as update. ``gemm_us`` is D^T H, once more by itself: in ``step`` autograd computes it in one node
with D W.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Iterable, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import neurms
from benchmarks.bandwidth import SHAPES, bandwidth
from benchmarks.harness import RESULTS, Results
from benchmarks.laws import exponent
from benchmarks.overhead_plot import draw
from benchmarks.processor import counters, vectors
from neurms.callbacks.profiler.optimizer_view import OptimizerView
from neurms.callbacks.profiler.timing import LayerTimer
from neurms.callbacks.profiler.window import OPTIMIZER, Window
from neurms.core.ground.spans import observed_by

WIDTHS = (64, 128, 256, 512, 1024, 2048, 4096)
BATCHES = (32, 128, 512, 2048)
THREADS = (1, 2)
MODES: dict[str, dict[str, Any]] = {
    "step": {"variant": "F"},
    "backward": {"variant": "F", "update": "backward"},
    "backward bf16": {"variant": "F", "update": "backward", "gemm": "bfloat16"},
}
MOMENTS: dict[str, dict[str, Any]] = {
    "P step": {"variant": "P"},
    "P backward": {"variant": "P", "update": "backward"},
}
PARTS = ("forward", "backward", "reduce", "scale", "update", "bookkeeping")


class Layer:
    """The second of two layers, with a clock on it."""

    def __init__(self, width: int, batch: int, mode: str) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.optimizer = neurms.NeuRMS(self.model, lr=1e-4, **(MODES | MOMENTS)[mode])
        self.batch, self.width = batch, width
        self.timer = LayerTimer("layer")
        # After the optimizer's hooks, as a profiler's are.
        self.timer.attach(self.model[2])
        self.view = OptimizerView([self.optimizer])
        self.owners: dict[Tensor, str] = {p: "layer" for p in self.model[2].parameters()}

    def step(self) -> dict[str, float]:
        """Take one training step on fresh data and return the layer's microseconds by part."""
        inputs = torch.randn(self.batch, self.width)
        targets = torch.randn(self.batch, self.width)
        window = Window(inputs.device, self.view, self.owners, lambda: None)
        self.timer.stopwatch = window.stopwatch
        handle = self.optimizer.register_step_pre_hook(window.before_step)
        with observed_by(window):
            nn.functional.mse_loss(self.model(inputs), targets).backward()
            self.optimizer.step()
        window.after_step()
        handle.remove()
        self.optimizer.zero_grad()
        totals = window.stopwatch.totals()
        found = {f"{part}_us": totals.get((part, "layer"), 0.0) for part in PARTS}
        found["optimizer_us"] = totals.get(("step", OPTIMIZER), 0.0) / 2
        found["gemm_us"] = self._gemm(inputs, targets)
        return found

    def _gemm(self, h: Tensor, d: Tensor) -> float:
        start = time.perf_counter_ns()
        d.T @ h
        return (time.perf_counter_ns() - start) / 1e3


def measured(width: int, batch: int, threads: int, mode: str) -> dict[str, Any]:
    """Return the medians of one combination, with the shares they make."""
    torch.set_num_threads(threads)
    layer = Layer(width, batch, mode)
    # Six products of two layers, at a guess of 90 GFLOP/s a thread: under a second in all.
    rounds = max(5, min(60, int(0.8 * 90e9 * threads / (12 * batch * width * width))))
    for _ in range(3 if rounds > 5 else 1):
        layer.step()
    steps = [layer.step() for _ in range(rounds)]
    found = {key: statistics.median(s[key] for s in steps) for key in steps[0]}
    total = sum(found[f"{part}_us"] for part in PARTS)
    kernels = found["reduce_us"] + found["scale_us"]
    other = found["bookkeeping_us"] + found["optimizer_us"]
    return {
        "width": width,
        "batch": batch,
        "threads": threads,
        "mode": mode,
        "rounds": rounds,
        **found,
        "kernels_us": kernels,
        "total_us": total,
        "share": kernels / total,
        "share_with_bookkeeping": (kernels + other) / (total + found["optimizer_us"]),
    }


def combinations(modes: Iterable[str] = MODES) -> list[tuple[int, int, int, str]]:
    """Return all combinations, the cheap ones first."""
    every = itertools.product(WIDTHS, BATCHES, THREADS, modes)
    return sorted(every, key=lambda c: c[0] ** 2 * c[1] / c[2])


def laws(runs: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return the fitted exponents by mode and threads, over all batches and for each of them.

    ``kernels`` is reduce + scale, ``all`` has the bookkeeping too. ``arithmetic`` keeps the runs
    whose kernels take at least three times what they do at the smallest width and batch, where
    they cost the same whatever they work on.
    """
    found: dict[str, Any] = {}
    for mode, threads in itertools.product(MODES | MOMENTS, THREADS):
        own = [run for run in runs if (run["mode"], run["threads"]) == (mode, threads)]
        if not own:
            continue
        least = min(run["kernels_us"] for run in own)
        large = [run for run in own if run["kernels_us"] >= 3 * least]
        batch = itemgetter("batch")
        entry = {
            "kernels": exponent(own, "share", batch),
            "kernels, arithmetic": exponent(large, "share", batch),
            "all": exponent(own, "share_with_bookkeeping", batch),
            "fixed_us": least,
        }
        for size in BATCHES:
            one = [run for run in own if run["batch"] == size]
            entry[f"kernels, batch {size}"] = exponent(one, "share")
        found[f"{mode}, {threads} threads"] = entry
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, fit, draw and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--variant", choices=("F", "P"), default="F")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    moments = given.variant == "P"
    settings = {"widths": WIDTHS, "batches": BATCHES, "threads": THREADS, "variant": given.variant}
    results = Results(
        given.out or RESULTS / ("overhead_moments.json" if moments else "overhead.json"), settings
    )
    end = time.monotonic() + given.seconds
    left = 0
    for shape, threads, cached in itertools.product(SHAPES, THREADS, (False, True)):
        where = "cache" if cached else "memory"
        key = f"bandwidth {shape[0]} x {shape[1]}, {threads} threads, {where}"
        results.run(key, partial(bandwidth, *shape, threads, cached=cached))
    for combination in combinations(MOMENTS if moments else MODES):
        width, batch, threads, mode = combination
        key = f"{width} x {batch}, {threads} threads, {mode}"
        if key in results.runs or time.monotonic() < end:
            results.run(key, partial(measured, *combination))
        else:
            left += 1
    runs = [run for run in results.runs.values() if "mode" in run]
    results.save(laws=laws(runs), counters=counters(), vectors=vectors())
    if not moments:
        draw(runs, results.content["laws"])
    print(f"{left} combinations left for the next time" if left else "complete")


if __name__ == "__main__":
    main()
