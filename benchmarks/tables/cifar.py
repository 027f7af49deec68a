"""The section on CIFAR-10."""

from __future__ import annotations

from typing import Any

from benchmarks.significance import compared, spread
from benchmarks.tables.markdown import markdown
from benchmarks.tables.provenance import made_by

__all__ = ["cifar"]

Content = dict[str, Any]

CIFAR = """## CIFAR-10 (JPEG)

The images come from JPEG copies: not comparable with published figures. All methods get the same
number of steps; {trials} trials for the rate on shorter runs. Mirrored at random, batch 128.

{table}

{made}
"""


def cifar(content: Content) -> str:
    """Return the section on CIFAR-10."""
    groups: dict[tuple[str, str], dict[str, tuple[str, list[float]]]] = {}
    for key, run in content["runs"].items():
        net, method, length, lr, *seed = key.split("/")
        if seed:
            lr = lr.removeprefix("lr ")
            place = groups.setdefault((net, length), {})
            place.setdefault(method, (lr, []))[1].append(run["accuracy"])
    lines = []
    for (net, length), methods in groups.items():
        base = methods.get("AdamW", ("", []))[1]
        others = {n: s for n, (_, s) in methods.items() if n != "AdamW" and len(s) == len(base) > 1}
        tests = compared(base, others) if others else {}
        for method, (lr, scores) in sorted(methods.items(), key=lambda x: -spread(x[1][1])[0]):
            mean, std = spread(scores)
            test = tests.get(method)
            lines.append(
                [
                    f"{net}, {length}: {method}",
                    lr,
                    f"{mean:.4f}",
                    f"{std:.4f}" if len(scores) > 1 else "",
                    str(len(scores)),
                    f"{-100 * test['difference']:+.2f}" if test else "",
                    f"{test['p_holm']:.3f}" if test else "",
                ]
            )
    if not lines:
        return ""
    header = ["network, run, method", "lr", "test", "std", "seeds", "- AdamW", "p"]
    trials = content["settings"]["trials"]
    return CIFAR.format(trials=trials, table=markdown(header, lines), made=made_by(content))
