"""Why NeuRMS stands where it does at equal wall-clock: what its step costs, what is left beside."""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarks.perceptron_rows import Cell, best_of
from benchmarks.tables.duels import float32, places
from benchmarks.tables.markdown import markdown

__all__ = ["reasons", "split"]

TEXT = """### What its step costs, and what is left

The NeuRMS that validation images choose, in float32 and of all, less AdamW, in points. A step that
takes longer leaves fewer steps: how many points that is worth is read from AdamW's own accuracy
between its budgets, by the logarithm of the steps. What is left would be the difference at equal
steps.

{table}
"""


def reasons(found: Sequence[Cell]) -> str:
    """Return the section, empty where no network has AdamW in two budgets."""
    lines = []
    for place in places(found):
        own = [cell for cell in found if cell.place == place]
        adamw = [c for c in found if c.place[:2] == place[:2] and c.method == "AdamW"]
        # The best in float32 and, where that is another one, the best of all.
        for ours in dict.fromkeys((best_of(float32(own)), best_of(own))):
            if ours is None or (parts := split(ours, adamw)) is None:
                continue
            data, net, seconds = place
            ratio = f"{ours.ms / adamw[0].ms:.2f}"
            shown = [f"{part:+.2f}" for part in parts]
            lines.append([f"{data} {net} {seconds:g} s", ours.method, ratio, *shown])
    if not lines:
        return ""
    header = ["setting", "NeuRMS", "step / AdamW's", "- AdamW", "by the step's time", "left"]
    return TEXT.format(table=markdown(header, lines))


def split(ours: Cell, adamw: Sequence[Cell]) -> tuple[float, float, float] | None:
    """Return the gap to AdamW, in points, the part that the step's time makes, and the rest.

    Args:
        ours: A method in one budget.
        adamw: AdamW in every budget of that data set and network.

    Returns:
        None where AdamW is not in that budget and in another one.
    """
    by_seconds = sorted(adamw, key=lambda cell: cell.place[2])
    here = next((i for i, c in enumerate(by_seconds) if c.place == ours.place), None)
    if here is None or len(by_seconds) < 2:
        return None
    # Towards fewer steps where there is a shorter budget: that is where a slow step leads.
    near = by_seconds[here - 1] if here else by_seconds[1]
    same = by_seconds[here]
    slope = (same.mean - near.mean) / math.log(same.steps / near.steps)
    gap = 100 * (ours.mean - same.mean)
    time = -100 * slope * math.log(ours.ms / same.ms)
    return gap, time, gap - time
