"""The section on NeuRMS's sensitivity: each setting off its default, by variant and data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.ablations import SENSITIVITY
from benchmarks.significance import compared
from benchmarks.tables.markdown import counted, markdown, p_said

Content = Mapping[str, Any]

SURE = 0.05

TEXT = """## Do NeuRMS's defaults stand?

One of beta (default .99), s_max (100), v_min (1e-12) and, for F, c_max (100) off its default, with
momentum .9; each row with its own search of {trials} rates. Test accuracy less the default's, in
points, and the *p* of a paired t-test over {seeds} seeds, after Holm's correction for the changes
of that column.

{table}

{verdict} The draft's values are beta of .99, .995 or .999, s_max of 10, 30 or 100 and no bias
correction (`NeuRMS(model, bias_correction=False)`): each is one argument. A v_min up to 1e-4 bounds
factors by no more than s_max 100 does, and has a row only where s_max is out of the way.
"""


@dataclass(frozen=True)
class Change:
    """What one change did on one data set.

    Args:
        variant: U or F.
        name: The change.
        data: The data set.
        points: Accuracy less the default's, in points.
        p: After Holm's correction over the changes of that variant and data set.
    """

    variant: str
    name: str
    data: str
    points: float
    p: float


def scores(content: Content) -> dict[str, list[float]]:
    """Return the test accuracies by row of a file of ``neurms bench ablations``."""
    found: dict[str, list[float]] = {}
    for key, run in content["runs"].items():
        name, *rest = key.split("/")
        if rest[0].startswith("lr "):
            found.setdefault(name, []).append(run["accuracy"])
    return found


def changes(content: Content) -> list[Change]:
    """Return every change that one file has with as many seeds as its default."""
    found, data = scores(content), content["settings"].get("data", "mnist")
    made = []
    for variant, methods in SENSITIVITY.items():
        base = found.get(variant, [])
        series = {name: found.get(f"{variant}, {name}", []) for name in methods}
        whole = {name: own for name, own in series.items() if len(own) == len(base) > 1}
        tests = compared(base, whole) if whole else {}
        made += [
            Change(variant, name, data, -100 * test["difference"], test["p_holm"])
            for name, test in tests.items()
        ]
    return made


def sensitivity(contents: Sequence[Content]) -> str:
    """Return the section from the files of all data sets, empty before there are runs for it."""
    found = [change for content in contents for change in changes(content)]
    if not found:
        return ""
    columns = list(dict.fromkeys((c.variant, c.data) for c in found))
    cells = {(c.name, c.variant, c.data): f"{c.points:+.2f} ({p_said(c.p)})" for c in found}
    lines = [
        [name, *(cells.get((name, *column), "") for column in columns)]
        for name in dict.fromkeys(c.name for c in found)
    ]
    header = ["change", *(f"{variant}, {data}" for variant, data in columns)]
    return TEXT.format(
        trials=counted(content["settings"]["trials"] for content in contents),
        seeds=counted(len(scores(content)["U"]) for content in contents),
        table=markdown(header, lines),
        verdict=verdict(found),
    )


def verdict(found: Sequence[Change]) -> str:
    """Return in words whether any change is better than its default, and the extremes."""
    better = [c for c in found if c.p <= SURE and c.points > 0]
    worse = [c for c in found if c.p <= SURE and c.points < 0]
    most, least = max(found, key=lambda c: c.points), min(found, key=lambda c: c.points)
    reach = f"They lie between {_named(least)} and {_named(most)}."
    if not better:
        return (
            f"Of {len(found)} comparisons none is significantly better than the default, "
            f"{len(worse)} significantly worse: the defaults stand. {reach}"
        )
    return (
        f"Of {len(found)} comparisons these are significantly better than the default: "
        f"{', '.join(map(_named, better))}; {len(worse)} are significantly worse. {reach}"
    )


def _named(change: Change) -> str:
    where = f"{change.variant}, {change.data}, {p_said(change.p)}"
    return f"{change.points:+.2f} by {change.name} ({where})"
