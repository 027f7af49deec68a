"""The section on the deep autoencoder."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.autoencoder import TIMES
from benchmarks.tables.markdown import markdown
from benchmarks.tables.provenance import made_by

PUBLISHED = {
    "Adam": (54.66, 50, 1593),
    "BlockAdam": (51.78, 230, 2619),
    "Shampoo(250)": (51.56, 165, 2649),
    "Shampoo(1000)": (51.22, 553, 3641),
    "Sketchy": (52.41, 1998, 2799),
    "SharedBasis": (51.49, 140, 1777),
}
"""Train loss, seconds and MB after 100 epochs on a GPU: Yen et al., NeurIPS 2023."""

EVERY_STEP = "Shampoo(1000), roots every step"

TEXT = """## MNIST's deep autoencoder

784-1000-500-250-30-250-500-1000-784 with tanh, batch 1000, the cross entropy of an image summed
over its pixels, warmup and linear decay, one seed; {trials} trials for the rate, {search} steps
each{unlike}.
The paper trains for 6,000 steps: its losses stand beside ours for their order alone. Seconds a
step are measured on one thread. Shampoo and Sketchy take their roots and sketches every tenth step,
SharedBasis does all of its work in every step; Shampoo with roots in every step was timed alone
({every:.2f} s). SharedBasis's momentum sums its updates where the others' averages them: the same
rate is ten times the step, so its rates lie a factor of ten lower. A dash means that a run has not
been made.

{table}

![Loss over steps](figures/autoencoder-loss.svg)

{verdict}

{made}
"""


def finals(content: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return each method's longest runs, whose loss is finite."""
    found: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for key, run in content["runs"].items():
        method, _, *rest = key.split("/")
        if len(rest) == 2 and run["loss"] is not None:
            found.setdefault(method, {}).setdefault(run["steps"], []).append(run)
    return {method: by_steps[max(by_steps)] for method, by_steps in found.items()}


def searched(content: dict[str, Any]) -> dict[str, dict[float, float]]:
    """Return each method's losses at the end of its search, by learning rate."""
    found: dict[str, dict[float, float]] = {}
    for key, run in content["runs"].items():
        method, what, *rest = key.split("/")
        if what.startswith("search") and run["loss"] is not None:
            found.setdefault(method, {})[float(rest[0].removeprefix("lr "))] = run["loss"]
    return found


def autoencoder(content: dict[str, Any]) -> str:
    """Return the section, empty before step times were measured."""
    runs, losses = finals(content), searched(content)
    times = content["runs"].get(f"{TIMES}1")
    if times is None:
        return ""
    counts = [run["steps"] for run in content["runs"].values() if "steps" in run]
    search = min(counts, default=0)
    lines = []
    for method in sorted(
        PUBLISHED, key=lambda name: min(losses.get(name, {}).values(), default=9e9)
    ):
        published, seconds = PUBLISHED[method], times[method]["seconds"]
        own, tried = runs.get(method, []), losses.get(method, {})
        best = min(tried, key=tried.__getitem__, default=None)
        lines.append(
            [
                method,
                "-" if best is None else f"{tried[best]:.1f} ({best:g}, of {len(tried)})",
                f"{_loss(own):.1f} ({own[0]['steps']})" if own else "-",
                f"{seconds:.2f}",
                f"{seconds / times['Adam']['seconds']:.2f}",
                f"{own[0]['state_bytes'] / 1e6:.1f}" if own else "-",
                f"{published[0]:.2f}",
                f"{published[1] / PUBLISHED['Adam'][1]:.1f}",
            ]
        )
    trials = content["settings"]["trials"]
    fewer = any(len(tried) < trials for tried in losses.values())
    header = [
        "method",
        f"loss after {search} steps (best lr, of how many)",
        "after a whole run (steps)",
        "s a step",
        "/ Adam's",
        "state MB",
        "paper's loss",
        "paper's time / Adam's",
    ]
    return TEXT.format(
        search=search,
        trials=trials,
        unlike=", fewer so far where the table says so" if fewer else "",
        every=times[EVERY_STEP]["seconds"],
        table=markdown(header, lines),
        verdict=_verdict(runs, losses, times),
        made=made_by(content),
    )


def _loss(runs: list[dict[str, Any]]) -> float:
    return statistics.fmean(run["loss"] for run in runs)


def _verdict(
    runs: dict[str, list[dict[str, Any]]],
    losses: dict[str, dict[float, float]],
    times: dict[str, Any],
) -> str:
    pair = ("SharedBasis", "Adam")
    parts = []
    if losses.keys() >= set(pair):
        parts.append(
            _compared("At the end of the search", *(min(losses[n].values()) for n in pair))
        )
    if runs.keys() >= set(pair):
        parts.append(_compared("After a whole run", *(_loss(runs[n]) for n in pair)))
    own = times["SharedBasis"]["seconds"]
    every, tenth = (own / times[name]["seconds"] for name in (EVERY_STEP, "Shampoo(1000)"))
    parts.append(
        f"SharedBasis's step takes {every:.2f} of the time of Shampoo(1000)'s with roots in every "
        f"step and {tenth:.2f} of it with roots every tenth step (the paper: 0.25)."
    )
    return " ".join(parts)


def _compared(when: str, ours: float, adam: float) -> str:
    relation = "below" if ours < adam else "not below"
    return f"{when} SharedBasis's train loss is {relation} Adam's ({ours:.1f} against {adam:.1f})."
