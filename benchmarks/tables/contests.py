"""The page of comparisons under the rules of benchmarks/README.md."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.evidence.claims import CLAIMS, outcomes
from benchmarks.evidence.ledger import Row, rows
from benchmarks.evidence.verdicts import SURE, Verdict, verdicts
from benchmarks.significance import spread
from benchmarks.tables import equal_time
from benchmarks.tables.markdown import markdown, p_said, p_value
from benchmarks.tables.provenance import made_by

__all__ = ["BASELINE", "CONTROL", "NAMES", "SHOWN", "judged", "page", "section", "summary"]

Content = dict[str, Any]

BASELINE = "AdamW"

CONTROL = "AdamW, two rates"
"""AdamW with a second rate where the other rules have one for their fallback."""

NAMES = tuple(
    f"contests/{task}"
    for task in (
        "text-64",
        "text-64-timed",
        "text-64-long",
        "text-128",
        "tags",
        "mnist",
        "fashion-conv",
        "resnet20",
    )
)
"""The results files of what is compared; the first results page shows them in short."""

SHOWN = (*NAMES, "contests/demo", *equal_time.NAMES)
"""The results files of the page."""

HEAD = """# Comparisons

Written by `python -m benchmarks.tables`. Every row had the same number of different trials over
the settings that it has, momenta and AdamW's betas among them, and over rate and momentum of the
AdamW that takes what is outside of its rule (embeddings, heads, norms). AdamW by itself has one
rate; "AdamW, two rates" has a second one there, as the other rules do. A validation split and a
tuning seed chose; a test split and seeds that were never tuned on are reported, the same ones for
every row. All in float32, torch's optimizers with their fused kernels.

*p* is of no difference to AdamW (paired t-test), *p level* of a difference of the margin or more
(two one-sided tests); both are corrected for all rows of the table by Holm's rule, for each of the
two AdamWs by itself. "To AdamW" and "to two rates" say how a row stands to them; "open" means that
these seeds tell neither. A dagger marks a value at the edge of what its search tried.
"""

SECTION = """## {title}

{figure}; margin {margin:g}; {trials} trials a row; {seeds} seeds; {details}.
{note}
{table}

{claims}{made}
"""

TITLES = {
    "text-64": "A small LLaMA, width 64",
    "text-64-timed": "A small LLaMA, width 64, at equal time",
    "text-64-long": "A small LLaMA, width 64, 5,000 steps",
    "text-128": "A small LLaMA, width 128",
    "tags": "Tags of ancient Greek",
    "mnist": "MNIST, a perceptron, two epochs",
    "fashion-conv": "Fashion-MNIST, a small convolutional network",
    "resnet20": "CIFAR-10 (JPEG), ResNet-20",
    "demo": "What `neurms demo` trains: a tiny decoder on Python's manual",
}

NOTES = {
    "text-64-timed": """
Each row takes as many steps as its own step time allows, which `neurms bench contest_step` measures
side by side on one thread.
""",
    "tags": """
AGDT's nine-place tags, each whole tag a class; words by hashed embeddings of themselves and their
endings. The treebank's development part chose and its test part is reported; a tag that training
lacks counts as missed. In a run this short embedding and head, which go to AdamW, do much of the
work. The shared-basis paper, with 6 layers trained to the end: Adam 67.36 %, Block Adam 70.43,
Shampoo 68.8, Sketchy 68.32, shared basis 70.63.
""",
}
"""What else a reader has to know of a comparison."""

HIDDEN = ("kind",)


def page(contents: Mapping[str, Content]) -> str:
    """Return the page.

    Args:
        contents: Of the results files of :data:`SHOWN` that exist, by name.
    """
    single = [name for name in SHOWN if name in contents and name not in equal_time.NAMES]
    made = [*(section(contents[name]) for name in single), equal_time.section(contents)]
    return "\n".join([HEAD, *filter(None, made)])


def section(content: Content) -> str:
    """Return one comparison: its rows, best first, against AdamW."""
    design = content["settings"]["design"]
    found, against = judged(content)
    scores = {row.name: row.scores for row in found}
    details = design["details"].items()
    shown = {k: v for k, v in details if k not in HIDDEN and v is not None}
    return SECTION.format(
        title=TITLES[design["task"]],
        figure=f"Test {design['figure']}",
        margin=design["margin"],
        trials=design["trials"],
        seeds=len(design["seeds"]),
        details=", ".join(f"{k} {v}" for k, v in shown.items()),
        note=NOTES.get(design["task"], ""),
        table=table(found, against, judged(content, CONTROL)[1]),
        claims=claims(design, scores),
        made=made_by(content),
    )


SUMMARY = """## What holds under the rules

Every method with the same search over its rates and momenta, fresh seeds and a test split;
[Comparisons](results/contests.md) has what was chosen, and the tests. Best first, against AdamW
with its betas tuned (p after Holm's correction).

{tables}
"""


def summary(contents: Mapping[str, Content]) -> str:
    """Return the comparisons in short, a table each; empty where there are none."""
    tables = [f"### {TITLES[_task(c)]}\n\n{_in_short(c)}" for c in contents.values()]
    return SUMMARY.format(tables="\n\n".join(tables)) if tables else ""


def _task(content: Content) -> str:
    return str(content["settings"]["design"]["task"])


def _in_short(content: Content) -> str:
    found, against = judged(content)
    lines = []
    for row in found:
        verdict = against.get(row.name)
        said = f"{_word(verdict)}, {p_said(verdict.p)}" if verdict else ""
        lines.append([row.name, _figure(row), said, _state(row)])
    figure = content["settings"]["design"]["figure"].split(",")[0]
    return markdown(["row", f"test {figure}", "against AdamW", "state MB"], lines)


def judged(content: Content, baseline: str = BASELINE) -> tuple[list[Row], dict[str, Verdict]]:
    """Return the complete rows, best first, and their verdicts; none where the baseline is not."""
    design = content["settings"]["design"]
    found = [row for row in rows(content) if row.complete]
    lower = design["better"] == "lower"
    # A row with a run that diverged has no mean, and stands last.
    means = {row.name: (1 if lower else -1) * spread(row.scores)[0] for row in found}
    found.sort(key=lambda row: (math.isnan(means[row.name]), means[row.name]))
    scores = {"": {row.name: row.scores for row in found}}
    if baseline not in scores[""]:
        return found, {}
    against = verdicts(scores, baseline, margin=design["margin"], better=design["better"])
    return found, {name: verdict for (_, name), verdict in against.items()}


def claims(design: Mapping[str, Any], scores: Mapping[str, Sequence[float]]) -> str:
    """Return what was to be shown of a comparison, and how it came out; empty for nothing."""
    lines = [
        [
            outcome.row,
            str(claim),
            f"{outcome.difference:+.4f}",
            p_value(outcome.p),
            "yes" if outcome.holds else "**not shown**",
        ]
        for claim in CLAIMS
        if claim.task == design["task"]
        for outcome in outcomes(claim, scores, design["better"])
    ]
    if not lines:
        return ""
    header = ["row", "was to be", "difference", "p", "holds"]
    return f"What was to be shown:\n\n{markdown(header, lines)}\n\n"


def table(
    found: Sequence[Row], against: Mapping[str, Verdict], control: Mapping[str, Verdict]
) -> str:
    """Return the rows of a comparison as tables: what decides, what it rests on, what was chosen.

    Args:
        found: The rows, best first.
        against: Their verdicts against AdamW.
        control: Their verdicts against AdamW with two rates.
    """
    first = ["row", "mean", "to AdamW", "to two rates", "state MB"]
    short = [
        [row.name, _figure(row), *(_word(v.get(row.name)) for v in (against, control)), _state(row)]
        for row in found
    ]
    # Of rows from before steps were kept, the design says how many they took.
    if len({row.steps for row in found} - {None}) > 1:
        first.append("steps")
        for row, line in zip(found, short, strict=True):
            line.append("" if row.steps is None else f"{row.steps:,}")
    header = ["row", "std", "- AdamW", "p", "p level", "- two rates", "p"]
    full = [_line(row, against.get(row.name), control.get(row.name)) for row in found]
    chosen = [[row.name, _chosen(row)] for row in found]
    tables = (markdown(first, short), markdown(header, full), markdown(["row", "chosen"], chosen))
    return "{}\n\nIn detail:\n\n{}\n\n{}".format(*tables)


def _line(row: Row, verdict: Verdict | None, control: Verdict | None) -> list[str]:
    _, std = spread(row.scores)
    return [row.name, f"{std:.4f}", *_cells(verdict), *_cells(control)[:2]]


def _cells(verdict: Verdict | None) -> list[str]:
    if verdict is None:
        return ["", "", ""]
    return [f"{verdict.difference:+.4f}", p_value(verdict.p), p_value(verdict.p_level)]


def _word(verdict: Verdict | None) -> str:
    if verdict is None:
        return ""
    return f"**{verdict.word}**" if verdict.p < SURE else verdict.word


def _figure(row: Row) -> str:
    return f"{spread(row.scores)[0]:.4f}"


def _state(row: Row) -> str:
    return "" if row.state_bytes is None else f"{row.state_bytes / 1e6:.3f}"


def _chosen(row: Row) -> str:
    edges = {edge.split()[0] for edge in row.edges}
    return ", ".join(
        f"{name.replace('_', ' ')} {value:g}{'†' * (name in edges)}" for name, value in row.chosen
    )
