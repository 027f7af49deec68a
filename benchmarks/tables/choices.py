"""What to use for what, in three lines, as the comparisons under the rules decide it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.evidence.ledger import Row
from benchmarks.evidence.verdicts import Verdict
from benchmarks.significance import spread
from benchmarks.tables.contests import BASELINE, CONTROL, judged
from benchmarks.tables.curves import curve, reached
from benchmarks.tables.markdown import p_said
from benchmarks.tables.naming import called

__all__ = ["Choice", "choice", "lines"]

Content = Mapping[str, Any]

LANGUAGE = ("text-128", "text-64")
IMAGES = ("fashion-conv", "resnet20", "mnist")
"""Comparisons by what they are about, the one that counts first."""

TIMED = "text-64-timed"
"""The comparison on text in which all rows train for the same time."""

LARGER = ("llama_cpu", "llama_cpu_zen3")
"""What a step of the larger LLaMA takes, on which machines."""

METHODS = {
    "Muon": "Muon",
    "P average": "NeuRMS-P average",
    "P": "NeuRMS-P",
    "RACS": "RACS",
    "RMNP": "RMNP",
}
"""A row's name -> its method's there."""

PLACES = {
    "text-64": "a small LLaMA, width 64",
    "text-128": "a small LLaMA, width 128",
    "mnist": "MNIST, a perceptron",
    "fashion-conv": "Fashion-MNIST, a small convolutional network",
    "resnet20": "CIFAR-10, ResNet-20",
}

NOTHING = "nothing has been compared under the rules yet."

ORDER = ("ahead", "ahead within the margin", "level", "open", "behind within the margin", "behind")
"""Verdicts, the best first."""


@dataclass(frozen=True)
class Choice:
    """The best row of a comparison beside AdamW, and how both stand.

    Args:
        task: The comparison.
        row: The best of the rows with the best verdict.
        verdict: Of the row, against AdamW.
        base: AdamW with its betas tuned.
        control: AdamW with two rates, and the row's verdict against it; None where it was not run.
    """

    task: str
    row: Row
    verdict: Verdict
    base: Row
    control: tuple[Row, Verdict] | None

    @property
    def share(self) -> float | None:
        """The row's bytes of state over AdamW's, None where a run did not record them."""
        if self.row.state_bytes is None or not self.base.state_bytes:
            return None
        return self.row.state_bytes / self.base.state_bytes


def choices(content: Content) -> list[Choice]:
    """Return every complete row that is no AdamW, the best verdict and then the best mean first."""
    task = str(content["settings"]["design"]["task"])
    found, against = judged(content)
    controlled = judged(content, CONTROL)[1]
    named = {row.name: row for row in found}
    result = []
    for row in found:
        finite = not any(math.isnan(score) for score in row.scores)
        if row.name in against and finite and not row.about["rule"].startswith("adamw"):
            control = (named[CONTROL], controlled[row.name]) if row.name in controlled else None
            result.append(Choice(task, row, against[row.name], named[BASELINE], control))
    # Rows come the best mean first, and sorting keeps that order among equals.
    return sorted(result, key=lambda one: ORDER.index(one.verdict.word))


def choice(contents: Mapping[str, Content], tasks: Sequence[str]) -> Choice | None:
    """Return the best row of the first of some comparisons that has any beside AdamW."""
    for task in tasks:
        content = contents.get(f"contests/{task}")
        if content is not None and (found := choices(content)):
            return found[0]
    return None


def lines(contents: Mapping[str, Content], steps: Content | None = None) -> list[str]:
    """Return the three lines.

    Args:
        contents: Results files of comparisons by name, those that there are.
        steps: ``contest_step_text.json``, for what a step takes, or None.
    """
    return [
        f"**For language models on a CPU:** {_line(contents, LANGUAGE, steps)}{_timed(contents)}",
        f"**For images:** {_line(contents, IMAGES, steps)}",
        f"**When memory is short:** {_memory(contents)}",
    ]


def _line(contents: Mapping[str, Content], tasks: Sequence[str], steps: Content | None) -> str:
    best = choice(contents, tasks)
    if best is None:
        return NOTHING
    price = _price(contents, best.row) if best.task in LANGUAGE else ""
    return said(best, _cost(best, steps) + price)


def _price(contents: Mapping[str, Content], row: Row) -> str:
    """Say what a row's step takes of AdamW's on the larger LLaMA, empty where nobody has looked."""
    key = f"float32 {METHODS.get(row.name)}"
    ratios = [contents[n]["runs"].get(key, {}).get("ratio") for n in LARGER if n in contents]
    found = [f"{ratio:.2f}" for ratio in ratios if ratio is not None]
    return f"; {' or '.join(found)} times AdamW's step with 19 M parameters" if found else ""


def _timed(contents: Mapping[str, Content]) -> str:
    """Say what comes out where all rows train for the same time, empty if nobody has looked."""
    content, led = contents.get(f"contests/{TIMED}"), choice(contents, LANGUAGE)
    found = choices(content) if content is not None else []
    if not found or led is None:
        return ""
    best = found[0]
    name = "it" if best.row.name == led.row.name else called(best.row)
    how = f"{figure(best.row)}, AdamW {figure(best.base)} ({_word(best.verdict)})"
    return f" In equal time (width 64) {name} has {how}."


def said(one: Choice, cost: str = "") -> str:
    """Return in a sentence or two how a row stands against AdamW with tuned betas.

    Args:
        one: The row.
        cost: What it takes beside that, as it goes on after a comma; empty for nothing.
    """
    own, base = figure(one.row), figure(one.base)
    code, p, word = called(one.row), p_said(one.verdict.p), one.verdict.word
    place = PLACES.get(one.task, one.task)
    kind = "Accuracy" if "accuracy" in one.row.design["figure"] else "Test loss"
    if word.startswith("behind"):
        return (
            f"AdamW. {kind} {base} ({place}); the nearest here, {code}, is behind with {own} ({p})."
        )
    if word.startswith("ahead") and one.control and one.control[1].word.startswith("behind"):
        control, verdict = one.control
        return (
            f"AdamW with a second rate outside of the rule. {kind} {figure(control)}, with one "
            f"{base} ({place}); {code} between them, {own} ({p_said(verdict.p)}, {p}){cost}."
        )
    if word.startswith("ahead"):
        small = ", a small lead" if "margin" in word else ""
        text = f"{code}. {kind} {own} where tuned AdamW has {base} ({place}; {p}{small}){cost}."
    elif word == "level":
        margin = one.row.design["margin"]
        text = f"{code} or AdamW. {kind} {own} and {base}, level within {margin:g} ({place}){cost}."
    else:
        text = f"AdamW or {code}. {kind} {base} and {own}, not told apart ({place}; {p}){cost}."
    return f"{text}{_control(one)}"


def figure(row: Row) -> str:
    """Return the mean of a row's figure, an accuracy in percent."""
    mean, _ = spread(row.scores)
    return f"{100 * mean:.2f} %" if "accuracy" in row.design["figure"] else f"{mean:.3f}"


def _cost(best: Choice, steps: Content | None) -> str:
    state = "" if best.share is None else f", for {_percent(best.share)} of its state"
    share = reached(curve(best.row), curve(best.base))
    if share is None:
        return state
    timed = {} if steps is None else steps["runs"].get(best.task, {})
    seconds = (
        f" and {_percent(share * timed[best.row.name]['ratio'])} of the time"
        if best.row.name in timed
        else ""
    )
    return f"{state}; AdamW's last validation loss after {_percent(share)} of the steps{seconds}"


def _control(best: Choice) -> str:
    """Say how AdamW with a second rate stands, where the row does not beat it."""
    if best.control is None or best.control[1].word.startswith("ahead"):
        return ""
    control, verdict = best.control
    words = {"open": "not told apart", "level": "level"}
    how = words.get(verdict.word, "ahead of this")
    return f" With two rates AdamW has {figure(control)}, {how}."


def _beside_control(best: Choice) -> str:
    """Say the same in fewer words, for a line below the first."""
    if best.control is None or best.control[1].word.startswith("ahead"):
        return ""
    words = {"open": "not told apart from", "level": "level with"}
    return f"; {words.get(best.control[1].word, 'behind')} AdamW with two rates"


def _memory(contents: Mapping[str, Content]) -> str:
    text = _least(contents, LANGUAGE, "on the same text")
    images = _least(contents, IMAGES, "on the same images", text.split(" keeps ")[0])
    if text and images:
        told = choice(contents, IMAGES)
        # The line before has said it, with the share.
        images = "" if told is not None and f"{called(told.row)} keeps" in images else images
    return " ".join(filter(None, (text, images))) or NOTHING


def _least(
    contents: Mapping[str, Content], tasks: Sequence[str], same: str, before: str = ""
) -> str:
    """Return which row keeps little state: of those ahead or level if any is, else not behind.

    What the line for these comparisons has said of AdamW already, ``same`` stands for; a row that
    the sentence ``before`` is about is "it".
    """
    said_of = choice(contents, tasks)
    for task in tasks:
        content = contents.get(f"contests/{task}")
        found = [c for c in choices(content) if (c.share or 1) < 1] if content else []
        if not found:
            continue
        # What could not be told apart may be worse: it is no answer where another is ahead.
        sure = [c for c in found if c.verdict.word.startswith(("ahead", "level"))]
        kept = sure or [c for c in found if c.verdict.word == "open"] or found
        # To the percent: two rows that differ by some bytes are ordered by how well they train.
        best = min(kept, key=lambda c: round(c.share or 1, 2))
        where = f"where AdamW has {figure(best.base)} ({PLACES.get(best.task, best.task)})"
        if said_of is not None and said_of.task == best.task:
            where = same
        how = f"{_word(best.verdict)}{_beside_control(best)}."
        if where == same and called(best.row) == before:
            where = f"{same[0].upper()}{same[1:]}"
            return f"{where} it keeps {_percent(best.share or 1)}: {figure(best.row)}, {how}"
        return (
            f"{called(best.row)} keeps {_percent(best.share or 1)} of AdamW's state: "
            f"{figure(best.row)} {where}, {how}"
        )
    return ""


def _word(verdict: Verdict) -> str:
    shown = "not told apart" if verdict.word == "open" else verdict.word
    return shown if verdict.word == "level" else f"{shown}, {p_said(verdict.p)}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else f"{100 * share:.1g} %"
