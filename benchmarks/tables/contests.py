"""The page of comparisons under the rules of benchmarks/README.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.evidence.claims import CLAIMS, outcomes
from benchmarks.evidence.ledger import Row, rows
from benchmarks.evidence.verdicts import SURE, Verdict, verdicts
from benchmarks.significance import spread
from benchmarks.tables.markdown import markdown
from benchmarks.tables.provenance import made_by

__all__ = ["BASELINE", "NAMES", "page", "section", "summary"]

Content = dict[str, Any]

BASELINE = "AdamW"

CONTROL = "AdamW, two rates"
"""AdamW with a second rate where the other rules have one for their fallback."""

NAMES = tuple(
    f"contests/{task}" for task in ("text-64", "text-128", "mnist", "fashion-conv", "resnet20")
)
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
two AdamWs by itself. "Open" means that these seeds tell neither. A dagger marks a value at the edge
of what its search tried.
"""

SECTION = """## {title}

{figure}; margin {margin:g}; {trials} trials a row; {seeds} seeds; {details}.

{table}

{claims}{made}
"""

TITLES = {
    "text-64": "A small LLaMA, width 64",
    "text-128": "A small LLaMA, width 128",
    "mnist": "MNIST, a perceptron, two epochs",
    "fashion-conv": "Fashion-MNIST, a small convolutional network",
    "resnet20": "CIFAR-10 (JPEG), ResNet-20",
}

HIDDEN = ("kind",)


def page(contents: Mapping[str, Content]) -> str:
    """Return the page.

    Args:
        contents: Of the results files of :data:`NAMES` that exist, by name.
    """
    return "\n".join([HEAD, *(section(contents[name]) for name in NAMES if name in contents)])


def section(content: Content) -> str:
    """Return one comparison: its rows, best first, against AdamW."""
    design = content["settings"]["design"]
    found, against = _judged(content)
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
        table=table(found, against, _judged(content, CONTROL)[1]),
        claims=claims(design, scores),
        made=made_by(content),
    )


SUMMARY = """## What holds under the rules

Every method with the same search over its rates and momenta, fresh seeds and a test split;
[Comparisons](results/contests.md) has the tables. Against AdamW with its betas tuned, best first
(p after Holm's correction):

{lines}
"""


def summary(contents: Mapping[str, Content]) -> str:
    """Return the comparisons in short, a line each; empty where there are none."""
    lines = [f"- **{TITLES[_task(c)]}**: {_in_short(c)}" for c in contents.values()]
    return SUMMARY.format(lines="\n".join(lines)) if lines else ""


def _task(content: Content) -> str:
    return str(content["settings"]["design"]["task"])


def _in_short(content: Content) -> str:
    found, against = _judged(content)
    said: dict[str, list[str]] = {}
    for row in found:
        if row.name in against:
            verdict = against[row.name]
            figure = f"{row.name} ({verdict.difference:+.4f}, p {verdict.p:.3f})"
            said.setdefault(verdict.word, []).append(figure)
    return "; ".join(f"{word}: {', '.join(names)}" for word, names in said.items()) + "."


def _judged(content: Content, baseline: str = BASELINE) -> tuple[list[Row], dict[str, Verdict]]:
    """Return the complete rows, best first, and their verdicts; none where the baseline is not."""
    design = content["settings"]["design"]
    found = [row for row in rows(content) if row.complete]
    lower = design["better"] == "lower"
    found.sort(key=lambda row: spread(row.scores)[0], reverse=not lower)
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
            f"{outcome.p:.3f}",
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
    """Return the rows of a comparison as Markdown.

    Args:
        found: The rows, best first.
        against: Their verdicts against AdamW.
        control: Their verdicts against AdamW with two rates.
    """
    header = ["row", "mean", "std", "- AdamW", "p", "p level", "so"]
    header += ["- two rates", "p", "so", "chosen", "state MB"]
    return markdown(
        header, [_line(row, against.get(row.name), control.get(row.name)) for row in found]
    )


def _line(row: Row, verdict: Verdict | None, control: Verdict | None) -> list[str]:
    mean, std = spread(row.scores)
    line = [row.name, f"{mean:.4f}", f"{std:.4f}", *_cells(verdict)]
    difference, p, _, word = _cells(control)
    state = "" if row.state_bytes is None else f"{row.state_bytes / 1e6:.3f}"
    return [*line, difference, p, word, _chosen(row), state]


def _cells(verdict: Verdict | None) -> list[str]:
    if verdict is None:
        return ["", "", "", ""]
    word = f"**{verdict.word}**" if verdict.p < SURE else verdict.word
    return [f"{verdict.difference:+.4f}", f"{verdict.p:.3f}", f"{verdict.p_level:.3f}", word]


def _chosen(row: Row) -> str:
    edges = {edge.split()[0] for edge in row.edges}
    return ", ".join(
        f"{name.replace('_', ' ')} {value:g}{'†' * (name in edges)}" for name, value in row.chosen
    )
