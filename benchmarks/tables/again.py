"""``docs/results/again.md``: the same benchmarks on another processor, row beside row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scipy.stats import kendalltau

from benchmarks.evidence.perceptrons import PLACES
from benchmarks.language_rows import rows
from benchmarks.significance import spread
from benchmarks.tables.accuracy import against_baseline
from benchmarks.tables.contests import TITLES, judged
from benchmarks.tables.markdown import markdown, p_value
from benchmarks.tables.provenance import made_by

__all__ = ["NAMES", "page"]

Content = dict[str, Any]

HEAD = """# The same on another machine

Written by `python -m benchmarks.tables`. Each benchmark below was run from its beginning, the
search of learning rates included, on two machines with different processors. Seeds are the same, so
that losses would be, but for rounding, which training amplifies. What should hold elsewhere are
rankings whose p is below .05, and ratios of times roughly; seconds do not.
"""

ACCURACY = """## MNIST, two epochs

Test accuracy less AdamW's, in points, with the p of a paired t-test by seed after Holm's
correction.

{table}

{verdict}

First: {first} Second: {second}
"""

LOSS = """## A small LLaMA, {cell}

The scale of [Where the published order of RMNP begins](text.md); loss less AdamW's, p after Holm's
correction.

{table}

{verdict}

First: {first} Second: {second}
"""

COST = """## What a step of the small LLaMAs costs

AdamW's milliseconds over the method's, one thread: above 1 is faster. SharedBasis's native kernel
came between the two, and is in the first alone.

{table}

Kendall's rank correlation of the two columns of a size: {correlations}; the largest change of a
ratio is that of {largest}{besides}.

First: {first} Second: {second}
"""

CONTEST = """## {title}, under the rules

{figure} of the rows that were run on both, less AdamW's, p after Holm's correction.

{table}

{verdict} Kendall's rank correlation of the rows' means is {tau:.2f}.

First: {first} Second: {second}
"""

CONTESTS = ("text-64", "demo", *(p for p in PLACES if p.endswith("-512-0.3s")))
"""Comparisons under the rules that are short enough to be run from their beginning again."""

CELL = "steps=300"
NATIVE_SINCE = "shared_basis"
SURE = 0.05
Gap = tuple[float, float]  # difference from AdamW, p


def page(contents: Mapping[str, Content]) -> str:
    """Return the page; sections that lack one of their two files are left out.

    Args:
        contents: Results files by name, those of the second machine by "again/NAME".
    """
    makers: dict[str, Callable[[Content, Content], str]] = {
        "mnist": _accuracy,
        "scales": _loss,
        "llama_step": _cost,
    }
    pairs = {name: (contents.get(name), contents.get(f"again/{name}")) for name in makers}
    makers |= dict.fromkeys(CONTESTS, _contest)
    pairs |= {n: (contents.get(f"contests/{n}"), contents.get(f"again/{n}")) for n in CONTESTS}
    sections = [
        makers[n](first, second) for n, (first, second) in pairs.items() if first and second
    ]
    return "\n".join([HEAD, *sections])


def _accuracy(first: Content, second: Content) -> str:
    sides = [{row["method"]: row for row in content["summary"]} for content in (first, second)]
    names = [name for name in sides[0] if name in sides[1]]
    names.sort(key=lambda name: -sides[0][name]["mean"])
    gaps = [against_baseline(content) for content in (first, second)]
    lines = []
    for name in names:
        cells = [f"{side[name]['lr']:g}" for side in sides]
        cells += [f"{side[name]['mean']:.4f}" for side in sides]
        lines.append([name, *cells, *_gaps(name, gaps, "+.2f")])
    header = _header("lr", "test accuracy", *_DIFFERENCES)
    return ACCURACY.format(
        table=markdown(header, lines), verdict=agreement(*gaps), **_sources(first, second)
    )


def _loss(first: Content, second: Content) -> str:
    steps = first["settings"]["cells"][CELL]["steps"]
    sides = [
        {row["optimizer"]: row for row in rows(content["runs"], steps, prefix=f"{CELL} ")}
        for content in (first, second)
    ]
    names = [name for name in sides[0] if name in sides[1]]
    gaps: list[dict[str, Gap]] = [
        {n: (row["difference"], row["p"]) for n, row in side.items() if row["p"] is not None}
        for side in sides
    ]
    lines = []
    for name in names:
        cells = [str(side[name]["lr"]) for side in sides]
        cells += [f"{side[name]['loss']:.4f}" for side in sides]
        lines.append([name, *cells, *_gaps(name, gaps, "+.4f")])
    header = _header("lr", "loss", *_DIFFERENCES)
    return LOSS.format(
        cell=f"{steps} steps",
        table=markdown(header, lines),
        verdict=agreement(*gaps),
        **_sources(first, second),
    )


def _contest(first: Content, second: Content) -> str:
    both = judged(first), judged(second)
    sides = [({row.name: row for row in found}, against) for found, against in both]
    names = [name for name in sides[0][0] if name in sides[1][0]]
    gaps = [
        {name: (v.difference, v.p) for name, v in against.items() if name in names}
        for _, against in sides
    ]
    means = [[spread(rows[name].scores)[0] for name in names] for rows, _ in sides]
    lines = []
    for k, name in enumerate(names):
        cells = [f"{dict(rows[name].chosen)['lr']:g}" for rows, _ in sides]
        cells += [f"{side[k]:.4f}" for side in means]
        lines.append([name, *cells, *_gaps(name, gaps, "+.4f")])
    design = first["settings"]["design"]
    figure = design["figure"].split(",")[0]
    return CONTEST.format(
        title=TITLES.get(design["task"], design["task"]),
        figure=f"Test {figure}",
        table=markdown(_header("lr", figure, *_DIFFERENCES), lines),
        verdict=agreement(*gaps),
        tau=float(kendalltau(*means).statistic),
        **_sources(first, second),
    )


def _cost(first: Content, second: Content) -> str:
    scales = [scale for scale in first["runs"] if scale in second["runs"]]
    ratios: dict[str, dict[str, tuple[float, float]]] = {}
    for scale in scales:
        sides = [content["runs"][scale] for content in (first, second)]
        for name in sides[0]:
            if name in sides[1] and name != "adamw":
                pair = tuple(side["adamw"]["ms"] / side[name]["ms"] for side in sides)
                ratios.setdefault(name, {})[scale] = (pair[0], pair[1])
    lines = [
        [name, *(part for scale in scales for part in _pair(found.get(scale)))]
        for name, found in ratios.items()
    ]
    alike = {
        (name, scale): abs(b / a - 1)
        for name, found in ratios.items()
        for scale, (a, b) in found.items()
        if name != NATIVE_SINCE
    }
    name, scale = max(alike, key=alike.__getitem__)
    a, b = ratios[name][scale]
    header = ["method", *(f"{scale}, {side}" for scale in scales for side in ("first", "second"))]
    return COST.format(
        table=markdown(header, lines),
        correlations=", ".join(f"{_correlation(ratios, s):.2f} ({s})" for s in scales),
        largest=f"{name} at {scale}, from {a:.2f} to {b:.2f}",
        besides=" (SharedBasis aside)" if NATIVE_SINCE in ratios else "",
        **_sources(first, second),
    )


_DIFFERENCES = ("- AdamW", "p")


def _header(*names: str) -> list[str]:
    return ["method", *(f"{name}, {side}" for name in names for side in ("first", "second"))]


def agreement(first: Mapping[str, Gap], second: Mapping[str, Gap]) -> str:
    """Say how many comparisons with AdamW come out alike on both machines.

    Args:
        first: The difference and its p by method, on the first machine.
        second: The same on the second one.
    """
    shared = [name for name in first if name in second]
    sides = [name for name in shared if first[name][0] * second[name][0] > 0]
    sure = [name for name in shared if first[name][1] < SURE]
    kept = [name for name in sure if name in sides and second[name][1] < SURE]
    turned = [
        name for name in shared if name not in sides and min(first[name][1], second[name][1]) < SURE
    ]
    parts = [
        f"Of {len(shared)} comparisons with AdamW {len(sides)} have the same sign.",
        f"Of the {len(sure)} with p below .05 on the first machine, {len(kept)} are so on the "
        "second, in the same direction."
        if sure
        else "On the first machine none has p below .05.",
        f"Significant on one machine and of the other sign on the other: {', '.join(turned)}."
        if turned
        else "None is significant on one machine and of the other sign on the other.",
    ]
    return " ".join(parts)


def _gaps(name: str, gaps: Sequence[Mapping[str, Gap]], form: str) -> list[str]:
    found = [side.get(name) for side in gaps]
    differences = ["" if gap is None else format(gap[0], form) for gap in found]
    return [*differences, *("" if gap is None else p_value(gap[1]) for gap in found)]


def _pair(found: tuple[float, float] | None) -> list[str]:
    return ["", ""] if found is None else [f"{part:.2f}" for part in found]


def _correlation(ratios: Mapping[str, Mapping[str, Gap]], scale: str) -> float:
    pairs = [found[scale] for name, found in ratios.items() if scale in found]
    return float(kendalltau(*zip(*pairs, strict=True)).statistic)


def _sources(first: Content, second: Content) -> dict[str, str]:
    return {"first": made_by(first), "second": made_by(second)}


NAMES = tuple(
    f"{side}{name}" for name in ("mnist", "scales", "llama_step") for side in ("", "again/")
) + tuple(f"{side}/{name}" for name in CONTESTS for side in ("contests", "again"))
"""The results files of the page."""
