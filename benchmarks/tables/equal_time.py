"""Perceptrons at equal time: the NeuRMS that validation images choose, against the best other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.evidence.ledger import Row, rows
from benchmarks.evidence.perceptrons import OURS, PLACES
from benchmarks.evidence.verdicts import SURE
from benchmarks.significance import equivalent, holm, paired, spread
from benchmarks.tables.markdown import markdown, p_value
from benchmarks.tables.provenance import made_by

__all__ = ["NAMES", "Duel", "duels", "section"]

Content = Mapping[str, Any]

NAMES = tuple(f"contests/{place}" for place in PLACES)
"""The results files."""

SECTION = """## Perceptrons at equal time

Test accuracy in percent after so many seconds of training on one thread; {trials} trials a row,
{seeds} seeds; {details}. Each row takes as many steps as its own step time allows, which `neurms
bench contest_step --task perceptrons` measures side by side. Best in bold.

{table}

The NeuRMS that validation images choose, less the best other row, in points. *p* is of no
difference, *p level* of one of {margin:g} points or more, both after Holm's correction over the
{family} pairs of a budget's chosen NeuRMS with another row. *steps* are those that both had time
for: where they are as many, the price of a step is not what decides.

{duels}

Of {places} budgets the chosen NeuRMS is {counts}.

{made}
"""


@dataclass(frozen=True)
class Duel:
    """The chosen NeuRMS of a place against the best other row.

    Args:
        place: The task.
        own: The row that validation images choose.
        other: The best other row on the test images.
        difference: Mean accuracy of the first less that of the second.
        p: Of no difference, corrected.
        p_level: Of a difference of the margin or more, corrected.
        steps: That both took in the time.
    """

    place: str
    own: str
    other: str
    difference: float
    p: float
    p_level: float
    steps: tuple[int | None, int | None] = (None, None)

    @property
    def word(self) -> str:
        """Ahead, behind, level or open; "level" only by the equivalence test."""
        if self.p_level < SURE:
            return "level"
        if self.p < SURE:
            return "ahead" if self.difference > 0 else "behind"
        return "open"


def duels(found: Mapping[str, Sequence[Row]], margin: float) -> list[Duel]:
    """Return one duel for each place, p values of all pairs corrected together.

    Args:
        found: By place, the complete rows.
        margin: Within which two rows count as level.
    """
    pairs: list[tuple[str, Row, Row]] = []
    for place, own in found.items():
        ours, others = ([r for r in own if (r.name in OURS) is side] for side in (True, False))
        if ours and others:
            chosen = max(ours, key=lambda row: row.chosen_figure)
            pairs += [(place, chosen, other) for other in others]
    tests = [paired(own.scores, other.scores) for _, own, other in pairs]
    corrected = holm([test["p"] for test in tests])
    level = holm([equivalent(own.scores, other.scores, margin)["p"] for _, own, other in pairs])
    best: dict[str, Duel] = {}
    for (place, own, other), test, p, p_level in zip(pairs, tests, corrected, level, strict=True):
        # The mean of the other row is highest where this difference is lowest.
        if place not in best or test["difference"] < best[place].difference:
            steps = own.steps, other.steps
            best[place] = Duel(place, own.name, other.name, test["difference"], p, p_level, steps)
    return list(best.values())


def section(contents: Mapping[str, Content]) -> str:
    """Return the section, empty where there are no results.

    Args:
        contents: Of the results files of :data:`NAMES` that exist, by name.
    """
    there = {
        place: contents[name] for name, place in zip(NAMES, PLACES, strict=True) if name in contents
    }
    found = {place: [r for r in rows(c) if r.complete] for place, c in there.items()}
    found = {place: own for place, own in found.items() if own}
    if not found:
        return ""
    design = there[next(iter(found))]["settings"]["design"]
    hidden = ("seconds", "network")
    details = [f"{k} {v}" for k, v in design["details"].items() if v and k not in hidden]
    fought = duels(found, design["margin"])
    words = [duel.word for duel in fought]
    kinds = ("ahead", "level", "open", "behind")
    others = sum(row.name not in OURS for own in found.values() for row in own)
    return SECTION.format(
        trials=design["trials"],
        seeds=len(design["seeds"]),
        details=", ".join(details),
        table=_means(found),
        margin=100 * design["margin"],
        family=others,
        duels=_fought(fought),
        places=len(fought),
        counts=", ".join(f"{kind} in {words.count(kind)}" for kind in kinds),
        made=made_by(there[next(iter(found))]),
    )


def _means(found: Mapping[str, Sequence[Row]]) -> str:
    names = list(dict.fromkeys(row.name for own in found.values() for row in own))
    means = {p: {row.name: 100 * spread(row.scores)[0] for row in own} for p, own in found.items()}
    best = {place: max(own.values()) for place, own in means.items()}
    lines = [
        [name, *(_cell(means[place].get(name), best[place]) for place in found)] for name in names
    ]
    return markdown(["", *map(_title, found)], lines)


def _cell(mean: float | None, best: float) -> str:
    if mean is None:
        return ""
    return f"**{mean:.2f}**" if mean == best else f"{mean:.2f}"


def _title(place: str) -> str:
    data, net, seconds = PLACES[place]
    return f"{data} {net}, {seconds:g} s"


def _fought(fought: Sequence[Duel]) -> str:
    lines = [
        [
            _title(duel.place),
            duel.own,
            duel.other,
            " / ".join("" if steps is None else f"{steps:,}" for steps in duel.steps),
            f"{100 * duel.difference:+.2f}",
            p_value(duel.p),
            p_value(duel.p_level),
            f"**{duel.word}**" if duel.word in ("ahead", "behind") else duel.word,
        ]
        for duel in fought
    ]
    head = ["budget", "chosen", "best other", "steps", "points", "p", "p level", ""]
    return markdown(head, lines)
