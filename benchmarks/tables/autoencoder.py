"""The section on the deep autoencoder."""

from __future__ import annotations

import math
import statistics
from typing import Any

from benchmarks.autoencoder import TIMES
from benchmarks.significance import compared
from benchmarks.tables.markdown import markdown, p_said, p_value
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
over its pixels, warmup and linear decay; {trials} rates for each method, over the first
{search}. The paper trains for 6,000 steps: its losses stand beside ours for their order
alone. Losses are over training images, as the paper's; in brackets the standard deviation over
seeds. *p* is a paired t-test's against Adam, by seed, after Holm's correction. Seconds a step are
measured on one thread, medians of {rounds} turns. Shampoo and Sketchy take their roots and sketches
every tenth step, SharedBasis does all of its work in every step; Shampoo with roots in every step
was timed alone ({every:.2f} s). SharedBasis's momentum sums its updates where the others' averages
them: the same rate is ten times the step, so its rates lie a factor of ten lower.

{table}

![Loss over steps](figures/autoencoder-loss.svg)

{verdict}

{made}
"""

Run = dict[str, Any]


def finals(content: dict[str, Any]) -> dict[int, dict[str, list[Run]]]:
    """Return the runs whose loss is finite by their number of steps, then by method and seed."""
    found: dict[int, dict[str, list[Run]]] = {}
    for key, run in content["runs"].items():
        method, _, *rest = key.split("/")
        if len(rest) == 2 and run["loss"] is not None:
            by_method = found.setdefault(run["steps"], {})
            by_method.setdefault(method, []).append(run | {"lr": rest[0].removeprefix("lr ")})
    return dict(sorted(found.items()))


def autoencoder(content: dict[str, Any]) -> str:
    """Return the section, empty before step times were measured and runs were made."""
    runs, times = finals(content), content["runs"].get(f"{TIMES}1")
    if times is None or not runs:
        return ""
    shortest = next(iter(runs.values()))
    tests = _tests(shortest)
    header = ["method"]
    for steps, methods in runs.items():
        seeds = max(map(len, methods.values()))
        header += ["lr", f"loss, {steps} steps, {seeds} seed{'s' * (seeds > 1)}"]
        header += ["p"] if methods is shortest else []
    header += ["s a step", "/ Adam's", "state MB", "paper's loss", "paper's time / Adam's"]
    order = sorted(PUBLISHED, key=lambda name: _loss(shortest.get(name, [])))
    lines = [_line(method, runs, tests, times) for method in order]
    return TEXT.format(
        search=_searched(content["runs"]),
        trials=content["settings"]["trials"],
        rounds=len(times["Adam"].get("turns", [0])),
        every=times[EVERY_STEP]["seconds"],
        table=markdown(header, lines),
        verdict=_verdict(runs, tests, times),
        made=made_by(content),
    )


def _searched(runs: dict[str, Any]) -> str:
    """Return of how many steps a search saw how many, from "Adam/search, 5 of 9 steps/lr 1"."""
    found = {key.split("/")[1] for key in runs if "/search, " in key}
    pairs = sorted(tuple(int(word) for word in name.split() if word.isdigit()) for name in found)
    return " and ".join(f"{seen} of {whole} steps" for seen, whole in pairs)


def _tests(methods: dict[str, list[Run]]) -> dict[str, dict[str, float]]:
    """Return each method's comparison with Adam, of those with as many seeds."""
    base = [run["loss"] for run in methods.get("Adam", [])]
    others = {n: [r["loss"] for r in own] for n, own in methods.items() if n != "Adam"}
    whole = {name: own for name, own in others.items() if len(own) == len(base) > 1}
    return compared(base, whole) if whole else {}


def _line(
    method: str,
    runs: dict[int, dict[str, list[Run]]],
    tests: dict[str, dict[str, float]],
    times: dict[str, Any],
) -> list[str]:
    line = [method]
    for number, methods in enumerate(runs.values()):
        own = methods.get(method, [])
        line += [own[0]["lr"] if own else "-", _shown(own)]
        line += [p_value(tests[method]["p_holm"]) if method in tests else ""] * (number == 0)
    published, seconds = PUBLISHED[method], times[method]["seconds"]
    state = [own[method][0]["state_bytes"] for own in runs.values() if method in own]
    return [
        *line,
        f"{seconds:.2f}",
        f"{seconds / times['Adam']['seconds']:.2f}",
        f"{state[0] / 1e6:.1f}" if state else "-",
        f"{published[0]:.2f}",
        f"{published[1] / PUBLISHED['Adam'][1]:.1f}",
    ]


def _loss(runs: list[Run]) -> float:
    return statistics.fmean(run["loss"] for run in runs) if runs else math.inf


def _shown(runs: list[Run]) -> str:
    if not runs:
        return "-"
    spread = f" ({statistics.stdev(run['loss'] for run in runs):.1f})" if len(runs) > 1 else ""
    return f"{_loss(runs):.1f}{spread}"


def _verdict(
    runs: dict[int, dict[str, list[Run]]],
    tests: dict[str, dict[str, float]],
    times: dict[str, Any],
) -> str:
    parts = []
    for number, (steps, methods) in enumerate(runs.items()):
        if methods.keys() >= {"SharedBasis", "Adam"}:
            ours, adam = _loss(methods["SharedBasis"]), _loss(methods["Adam"])
            relation = "below" if ours < adam else "not below"
            sure = tests.get("SharedBasis") if number == 0 else None
            p = f", {p_said(sure['p_holm'])}" if sure else ""
            parts.append(
                f"After {steps} steps SharedBasis's train loss is {relation} Adam's "
                f"({ours:.1f} against {adam:.1f}{p})."
            )
    own = times["SharedBasis"]["seconds"]
    every, tenth = (own / times[name]["seconds"] for name in (EVERY_STEP, "Shampoo(1000)"))
    parts.append(
        f"SharedBasis's step takes {every:.2f} of the time of Shampoo(1000)'s with roots in every "
        f"step and {tenth:.2f} of it with roots every tenth step (the paper: 0.25)."
    )
    return " ".join(parts)
