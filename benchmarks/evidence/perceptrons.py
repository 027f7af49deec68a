"""Perceptrons at equal time: each row takes as many steps as its own step time allows.

How long a step takes is measured once, side by side and quietly (``neurms bench contest_step
--task perceptrons``); then steps are counted, so that runs may share a machine with anything.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from benchmarks import vision
from benchmarks.evidence import entrants
from benchmarks.evidence.design import PERCEPTRON_SEEDS
from benchmarks.evidence.entrants import Entrant
from benchmarks.evidence.images import Images, Plan, handwritten
from benchmarks.harness import RESULTS

__all__ = ["BASELINE", "BATCH", "NETS", "OURS", "PLACES", "ROWS", "TIMES", "step_ms", "task"]

BATCH = 128
TRIALS = 8
TIMES = RESULTS / "contest_step.json"
BASELINE = "AdamW"

NETS = {"512": (784, 512, 10), "1024-1024": (784, 1024, 1024, 10)}
"""Sizes of layers by a network's name."""

PLACES: Mapping[str, tuple[str, str, float]] = {
    f"perceptron-{data}-{net}-{seconds:g}s": (data, net, seconds)
    for data in ("mnist", "fashion_mnist")
    for net, budgets in (("512", (0.3, 1.0, 5.0)), ("1024-1024", (1.0, 5.0)))
    for seconds in budgets
}
"""Task -> data, network and the seconds that a run trains."""

OURS = ("P", "P momentum", "P average", "P damped", "NeuRMS-U", "NeuRMS-U normalized", "NeuRMS-F")
"""The rows of which validation images choose one."""

LIKE = {"P average": "P momentum", "P damped": "P momentum"}
"""Rows that came later, and whose steps those are of that were timed with all the others. On the
machine of contest_step_zen3.json P average takes .97 (512) and 1.02 (1024-1024) of its step."""

ROWS = (BASELINE, "SGD", "RMNP", "RACS", "Muon", *OURS)


def rows() -> dict[str, Entrant]:
    """Return the methods."""
    known = entrants.images()
    return {name: known[name] for name in ROWS}


@functools.cache
def step_ms() -> Mapping[str, Mapping[str, float]]:
    """Return the milliseconds of a step by network, then by row: medians on one thread."""
    runs = json.loads(TIMES.read_text())["runs"] if TIMES.is_file() else {}
    if missing := [net for net in NETS if f"perceptron {net}" not in runs]:
        raise SystemExit(
            f"error: {TIMES} has no step times of the perceptrons {missing}; run neurms bench "
            "contest_step --task perceptrons first"
        )
    times = {}
    for net in NETS:
        found = runs[f"perceptron {net}"]
        # The median of paired ratios knows less of the machine's moods than that of times.
        times[net] = {name: row["ratio"] * found[BASELINE]["ms"] for name, row in found.items()}
    return times


def steps(place: str, row: str, times: Mapping[str, Mapping[str, float]] | None = None) -> int:
    """Return how many steps a row takes in a place's seconds."""
    _, net, seconds = PLACES[place]
    known = (step_ms() if times is None else times)[net]
    ms = known[row] if row in known else known[LIKE[row]]
    return max(10, round(1e3 * seconds / ms))


def task(place: str, row: str) -> Images:
    """Return what a row trains in a place."""
    data, net, _ = PLACES[place]
    plan = Plan(
        lambda: vision.perceptron(NETS[net]), lambda: handwritten(data), steps(place, row), BATCH
    )
    made = Images(place, plan, TRIALS, PERCEPTRON_SEEDS)
    made.design = replace(made.design, details=_details(place, made.design.details))
    return made


def _details(place: str, details: Mapping[str, Any]) -> dict[str, Any]:
    """Return a design's details with seconds in the place of steps, which differ by row."""
    _, net, seconds = PLACES[place]
    rest = {name: value for name, value in details.items() if name != "steps"}
    return {"network": "-".join(map(str, NETS[net])), "seconds": seconds, **rest}
