"""From the runs of a benchmark on text to the rows of its table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.language import final
from benchmarks.significance import holm, paired

Run = Mapping[str, Any]


def best_rate(runs: Mapping[str, Run], name: str, prefix: str = "") -> str:
    """Return a method's tuned rate, or the one it was given, as it is written in the keys."""
    found: dict[str, float] = {}
    for kind in ("tune", "final"):
        start = f"{prefix}{kind} {name} "
        found = found or {key: final(run) for key, run in runs.items() if key.startswith(start)}
    return str(min(found, key=found.__getitem__).split("lr=")[1].split()[0])


def finals(runs: Mapping[str, Run], steps: int, prefix: str = "") -> dict[str, dict[int, Run]]:
    """Return by method, then by seed, the runs at the tuned rate."""
    found: dict[str, dict[int, Run]] = {}
    for key, run in runs.items():
        if not key.startswith(f"{prefix}final ") or not key.endswith(f" steps={steps}"):
            continue
        name, lr, seed = key.removeprefix(f"{prefix}final ").split()[:3]
        if lr == f"lr={best_rate(runs, name, prefix)}":
            found.setdefault(name, {})[int(seed.removeprefix("seed="))] = run
    return found


def rows(
    runs: Mapping[str, Run],
    steps: int,
    *,
    prefix: str = "",
    baseline: str = "adamw",
    step_ms: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Return, for each method, its final loss and what it needs to reach the baseline's.

    Args:
        runs: A results file's runs.
        steps: Steps of the final runs.
        prefix: What the keys of these runs begin with.
        baseline: The method that the others are set against.
        step_ms: Milliseconds of a training step by method, measured side by side.

    Returns:
        Rows by ascending loss. ``difference`` and ``p`` are of a paired t-test over the seeds that
        both have, p corrected by Holm's procedure; ``step_ratio`` is the baseline's steps over
        those that the method's mean curve takes to the baseline's final loss; ``speedup``
        the same in seconds, from ``step_ms``. None stands for what there is not: a loss that was
        not reached, a test with less than two pairs.
    """
    found = finals(runs, steps, prefix)
    reference = found[baseline]
    target = statistics.fmean(final(run) for run in reference.values())
    table: list[dict[str, Any]] = []
    for name, own in found.items():
        losses = [final(run) for run in own.values()]
        shared = sorted(own.keys() & reference.keys())
        pairs = [(final(own[seed]), final(reference[seed])) for seed in shared]
        reached = first_below(list(own.values()), target)
        ratio = steps / reached if reached else None
        speed = step_ms[baseline] / step_ms[name] if step_ms and name in step_ms else None
        table.append(
            {
                "optimizer": name,
                "lr": best_rate(runs, name, prefix),
                "seeds": len(own),
                "loss": statistics.fmean(losses),
                "std": statistics.stdev(losses) if len(losses) > 1 else None,
                "difference": statistics.fmean(a - b for a, b in pairs) if pairs else None,
                "p": None if name == baseline else paired_p(pairs),
                "steps": reached,
                "step_ratio": ratio,
                "throughput": speed,
                "speedup": ratio * speed if ratio and speed else None,
            }
        )
    tested = [row for row in table if row["p"] is not None]
    for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p"] = p
    return sorted(table, key=lambda row: row["loss"])


def first_below(runs: Sequence[Run], target: float) -> float | None:
    """Return the step at which the mean curve meets the target, on the line between two points."""
    curves = [{step: loss for step, loss, _ in run["curve"]} for run in runs]
    common = sorted(set.intersection(*(set(curve) for curve in curves)))
    before: tuple[int, float] | None = None
    for step in common:
        loss = statistics.fmean(curve[step] for curve in curves)
        if loss <= target:
            if before is None or before[1] == loss:
                return float(step)
            share = (before[1] - target) / (before[1] - loss)
            return float(before[0] + share * (step - before[0]))
        before = step, loss
    return None


def paired_p(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Return the p value of a paired t-test, None for less than two pairs or a diverged run."""
    if len(pairs) < 2 or not all(math.isfinite(value) for pair in pairs for value in pair):
        return None
    first, second = zip(*pairs, strict=True)
    return float(paired(first, second)["p"])
