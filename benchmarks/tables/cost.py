"""The page on cost: overhead, the profiler's accuracy, memory, start, other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.overhead_plot import PICTURE
from benchmarks.overhead_plot import draw as draw_overhead
from benchmarks.tables import whole_steps
from benchmarks.tables.calls import calls
from benchmarks.tables.memory import memory
from benchmarks.tables.overhead import moments, overhead, profiler
from benchmarks.tables.peers import peers
from benchmarks.tables.startup import startup
from benchmarks.tables.zero_adapter import zero_adapter

__all__ = ["NAMES", "draw", "page"]

NAMES = (
    "overhead",
    "overhead_moments",
    "zero_adapter",
    "compiled_step",
    "step_images",
    "profiler_cost",
    "calls",
    "memory",
    "startup",
    "kernels",
)

HEAD = """# Cost

Time and memory, from `benchmarks/results/`; see [Results](../results.md) for speed against torch.
"""

_SECTIONS = {
    "overhead": overhead,
    "overhead_moments": moments,
    "zero_adapter": zero_adapter,
    "compiled_step": whole_steps.compiled,
    "step_images": whole_steps.images,
    "profiler_cost": profiler,
    "calls": calls,
    "memory": memory,
    "startup": startup,
    "kernels": peers,
}


def page(contents: dict[str, dict[str, Any]]) -> str:
    """Return the page that the results files there are make."""
    made = [write(contents[name]) for name, write in _SECTIONS.items() if name in contents]
    return "\n".join([HEAD, *made])


def draw(folder: Path, contents: dict[str, dict[str, Any]]) -> None:
    """Draw the share of reduce and scale against the width."""
    if "overhead" not in contents:
        return
    content = contents["overhead"]
    runs = [run for run in content["runs"].values() if "mode" in run]
    draw_overhead(runs, content["laws"], folder / PICTURE.name)
