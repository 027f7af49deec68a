"""NeuRMS against every other method, budget by budget: who is ahead, and how sure that is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.perceptron_rows import Cell, best_of, duel, front
from benchmarks.tables.markdown import markdown, p_said, p_value

__all__ = ["Outcome", "alone", "float32", "matrix", "outcomes", "places", "summary", "words"]

SURE = 0.05
Place = tuple[str, str, float]


@dataclass(frozen=True)
class Outcome:
    """One budget.

    Args:
        ours: The NeuRMS that validation images choose.
        rival: The other method with the highest test accuracy.
        points: Ours less the rival's, in points.
        p: Of that difference, after Holm's correction over all other methods.
        ahead: How many of the others are significantly behind ours.
        behind: How many are significantly ahead of it.
        others: How many there are.
        on_front: Every NeuRMS on the front of accuracy over time, best first.
        alone_ahead: Every NeuRMS that is, taken by itself, significantly ahead of all others,
            with the largest p of these comparisons.
        variants: How many NeuRMS there are.
    """

    ours: Cell
    rival: Cell
    points: float
    p: float
    ahead: int
    behind: int
    others: int
    on_front: tuple[str, ...]
    alone_ahead: tuple[tuple[str, float], ...]
    variants: int

    @property
    def name(self) -> str:
        """Data, network and seconds."""
        data, net, seconds = self.ours.place
        return f"{data} {net} {seconds:g} s"

    @property
    def kind(self) -> Literal["ahead", "level", "behind"]:
        """How ours stands to the best of the others."""
        if self.p > SURE:
            return "level"
        return "ahead" if self.points > 0 else "behind"


def float32(found: Iterable[Cell]) -> list[Cell]:
    """Return the cells of methods that multiply in float32 alone."""
    return [cell for cell in found if not cell.method.endswith("bf16")]


def places(found: Iterable[Cell]) -> list[Place]:
    """Return the budgets: MNIST first, small networks first, short ones first."""

    def order(place: Place) -> tuple[bool, str, int, str, float]:
        data, net, seconds = place
        return data != "mnist", data, len(net), net, seconds

    return sorted({cell.place for cell in found}, key=order)


def outcomes(found: Sequence[Cell]) -> list[Outcome]:
    """Return the outcome of every budget that has a NeuRMS and another method."""
    made = []
    for place in places(found):
        own = sorted((c for c in found if c.place == place), key=lambda cell: -cell.mean)
        ours, rivals = best_of(own), [cell for cell in own if not cell.ours]
        if ours is None or not rivals:
            continue
        tests = duel(ours, own)
        sure = [t["difference"] for t in tests.values() if t["p_holm"] <= SURE]
        best = tests[rivals[0].method]
        made.append(
            Outcome(
                ours=ours,
                rival=rivals[0],
                points=100 * best["difference"],
                p=best["p_holm"],
                ahead=sum(difference > 0 for difference in sure),
                behind=sum(difference < 0 for difference in sure),
                others=len(tests),
                on_front=_on_front(own, [c for c in found if c.place[:2] == place[:2]]),
                alone_ahead=_alone_ahead(own),
                variants=sum(cell.ours for cell in own),
            )
        )
    return made


def _alone_ahead(own: Sequence[Cell]) -> tuple[tuple[str, float], ...]:
    found = []
    for cell in own:
        tests = duel(cell, own).values() if cell.ours else ()
        if tests and all(t["p_holm"] <= SURE and t["difference"] > 0 for t in tests):
            found.append((cell.method, max(t["p_holm"] for t in tests)))
    return tuple(found)


def _on_front(own: Sequence[Cell], same: Sequence[Cell]) -> tuple[str, ...]:
    best = front(same)
    return tuple(cell.method for cell in own if cell.ours and cell in best)


def words(found: Sequence[Outcome]) -> str:
    """Return the outcomes as a list: ahead, level, behind."""
    titles = {
        "ahead": "NeuRMS is significantly ahead of the best other method",
        "level": "NeuRMS and the best other method cannot be told apart",
        "behind": "another method is significantly ahead of NeuRMS",
    }
    lines = []
    for kind, title in titles.items():
        own = [o for o in found if o.kind == kind]
        if own:
            named = ", ".join(f"{o.name} ({o.points:+.2f})" for o in own)
            lines.append(f"- {title} in {len(own)} of {len(found)} budgets: {named}.")
    fronts = [o.name for o in found if o.on_front]
    lines.append(
        f"- A NeuRMS is on the front of accuracy over time in {len(fronts)} of {len(found)}"
        + (f": {', '.join(fronts)}." if fronts else ".")
    )
    whole = [o.name for o in found if o.ahead == o.others]
    lines.append(
        f"- It is significantly ahead of every other method tried in {', '.join(whole)}."
        if whole
        else "- In none is it significantly ahead of every other method tried."
    )
    if said := alone(found):
        lines.append(f"- {said}")
    return "\n".join(lines)


def alone(found: Sequence[Outcome]) -> str:
    """Return which NeuRMS are ahead of all others taken by themselves, empty for none."""
    named = [
        f"{method} in {o.name} (largest of {o.others} p: {p_value(p)}; times the {o.variants} "
        f"NeuRMS: {p_value(min(1.0, p * o.variants))})"
        for o in found
        for method, p in o.alone_ahead
    ]
    if not named:
        return ""
    return (
        "Taken by itself, chosen by validation images or not, a NeuRMS is significantly ahead of "
        f"every other method run: {'; '.join(named)}."
    )


def summary(found: Sequence[Outcome]) -> str:
    """Return the outcomes in a sentence."""
    ahead, level, behind = (
        sum(o.kind == kind for o in found) for kind in ("ahead", "level", "behind")
    )
    return (
        f"Of {len(found)} budgets NeuRMS is significantly ahead in {ahead}, not told apart in "
        f"{level}, behind in {behind}; a NeuRMS is on the front of accuracy over time in "
        f"{sum(bool(o.on_front) for o in found)}."
    )


def matrix(found: Sequence[Outcome]) -> str:
    """Return a table with a row for each data set and network, a column for each budget."""
    seconds = sorted({o.ours.place[2] for o in found})
    lines = []
    for place in dict.fromkeys(o.ours.place[:2] for o in found):
        own = {o.ours.place[2]: o for o in found if o.ours.place[:2] == place}
        lines.append([" ".join(place), *(_shown(own.get(s)) for s in seconds)])
    return markdown(["", *(f"{s:g} s" for s in seconds)], lines)


def _shown(outcome: Outcome | None) -> str:
    if outcome is None:
        return ""
    points = f"{outcome.points:+.2f}"
    shown = f"**{points}**" if outcome.kind != "level" else points
    return f"{shown} on {outcome.rival.method} ({p_said(outcome.p)})"
