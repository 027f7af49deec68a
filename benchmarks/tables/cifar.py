"""The section on CIFAR-10."""

from __future__ import annotations

from typing import Any

from benchmarks.significance import compared, paired, spread
from benchmarks.tables.markdown import markdown, p_said, p_value
from benchmarks.tables.provenance import made_by
from benchmarks.vision import METHODS

__all__ = ["cifar"]

Content = dict[str, Any]

CIFAR = """## CIFAR-10 (JPEG)

The images come from JPEG copies: not comparable with published figures. All methods get the same
number of steps; {trials} trials for the rate on shorter runs, whose best accuracy on held-out
images is in the column *search*: near .10, which is chance, a search says little about the rate,
and rows after a longer one may stand below. Mirrored at random, batch 128.

{table}

{verdict}

{made}
"""


Scores = dict[str, tuple[str, list[float]]]


def cifar(content: Content) -> str:
    """Return the section on CIFAR-10."""
    lines, words = [], []
    searches = _searches(content["runs"])
    for (net, length), methods in _groups(content["runs"]).items():
        base = methods.get("AdamW", ("", []))[1]
        others = {n: s for n, (_, s) in methods.items() if n != "AdamW" and len(s) == len(base) > 1}
        tests = compared(base, others) if others else {}
        ordered = sorted(methods.items(), key=lambda item: -spread(item[1][1])[0])
        for method, (lr, scores) in ordered:
            mean, std = spread(scores)
            test = tests.get(method)
            lines.append(
                [
                    f"{net}, {length}: {method}",
                    lr,
                    _searched(searches.get((net, method), {}), length, lr),
                    f"{mean:.4f}",
                    f"{std:.4f}" if len(scores) > 1 else "",
                    str(len(scores)),
                    f"{-100 * test['difference']:+.2f}" if test else "",
                    p_value(test["p_holm"]) if test else "",
                ]
            )
        words.append(_verdict(f"{net}, {length}", {name: scores for name, (_, scores) in ordered}))
    if not lines:
        return ""
    header = ["network, run, method", "lr", "search", "test", "std", "seeds", "- AdamW", "p"]
    return CIFAR.format(
        trials=content["settings"]["trials"],
        table=markdown(header, lines),
        verdict="\n".join(filter(None, words)),
        made=made_by(content),
    )


def _groups(runs: Content) -> dict[tuple[str, str], Scores]:
    """Return by network and length of run each method's learning rate and accuracies by seed."""
    groups: dict[tuple[str, str], Scores] = {}
    for key, run in runs.items():
        net, method, length, lr, *seed = key.split("/")
        if seed:
            place = groups.setdefault((net, length), {})
            place.setdefault(method, (lr.removeprefix("lr "), []))[1].append(run["accuracy"])
    return groups


def _searches(runs: Content) -> dict[tuple[str, str], dict[int, dict[str, float]]]:
    """Return by network and method, then by steps of a search, its accuracies by learning rate."""
    found: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    for key, run in runs.items():
        net, method, length, lr, *seed = key.split("/")
        if not seed:
            own = found.setdefault((net, method), {}).setdefault(_steps(length), {})
            own[lr.removeprefix("lr ")] = run["accuracy"]
    return found


def _steps(length: str) -> int:
    """Return 30 of "search, 30 steps, 45000 images" or of "30 steps, 50000 images"."""
    return int(length.split(" steps")[0].split()[-1])


def _searched(searches: dict[int, dict[str, float]], length: str, lr: str) -> str:
    """Return what the longest search, no longer than the run, that found this rate saw with it."""
    fitting = [
        (steps, found[lr])
        for steps, found in searches.items()
        if steps <= _steps(length) and max(found, key=found.__getitem__) == lr
    ]
    return "{1:.3f}, {0} steps".format(*max(fitting)) if fitting else ""


def _verdict(net: str, scores: dict[str, list[float]]) -> str:
    """Return how the best NeuRMS stands to the best of the others; the best come first."""
    ours = next((name for name in scores if METHODS[name].ours), None)
    rival = next((name for name in scores if not METHODS[name].ours), None)
    if ours is None or rival is None or len(scores[ours]) != len(scores[rival]):
        return ""
    test = paired(scores[ours], scores[rival])
    p = f", {p_said(test['p'])} before correction" if len(scores[ours]) > 1 else ""
    return (
        f"On {net} the best NeuRMS, {ours}, is {100 * test['difference']:+.2f} points from the "
        f"best of the others, {rival}{p}."
    )
