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

__all__ = ["BASELINE", "NAMES", "page", "section"]

Content = dict[str, Any]

BASELINE = "AdamW"

NAMES = tuple(
    f"contests/{task}" for task in ("text-64", "text-128", "mnist", "fashion-conv", "resnet20")
)
"""The results files of the page."""

HEAD = """# Comparisons

Written by `python -m benchmarks.tables`. Every row had the same number of different trials over
the settings that it has, momenta and AdamW's betas among them, and over rate and momentum of the
AdamW that takes what is outside of its rule. A validation split and a tuning seed chose; a test
split and seeds that were never tuned on are reported, the same ones for every row. All in float32,
torch's optimizers with their fused kernels. *p* is of no difference to AdamW (paired t-test), *p
level* of a difference of the margin or more (two one-sided tests); both are corrected for all rows
of the table by Holm's rule. "Open" means that these seeds tell neither. A dagger marks a value at
the edge of what its search tried.
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
    found = [row for row in rows(content) if row.complete]
    lower = design["better"] == "lower"
    found.sort(key=lambda row: spread(row.scores)[0], reverse=not lower)
    scores = {row.name: row.scores for row in found}
    against = verdicts({"": scores}, BASELINE, margin=design["margin"], better=design["better"])
    return SECTION.format(
        title=TITLES[design["task"]],
        figure=f"Test {design['figure']}",
        margin=design["margin"],
        trials=design["trials"],
        seeds=len(design["seeds"]),
        details=", ".join(f"{k} {v}" for k, v in design["details"].items() if k not in HIDDEN),
        table=table(found, {name: verdict for (_, name), verdict in against.items()}),
        claims=claims(design, scores),
        made=made_by(content),
    )


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
    return f"Claims written down before the runs:\n\n{markdown(header, lines)}\n\n"


def table(found: Sequence[Row], against: Mapping[str, Verdict]) -> str:
    """Return the rows of a comparison as Markdown."""
    header = ["row", "mean", "std", "- AdamW", "p", "p level", "so", "chosen", "state MB"]
    return markdown(header, [_line(row, against.get(row.name)) for row in found])


def _line(row: Row, verdict: Verdict | None) -> list[str]:
    mean, std = spread(row.scores)
    line = [row.name, f"{mean:.4f}", f"{std:.4f}"]
    if verdict is None:
        line += ["", "", "", ""]
    else:
        word = f"**{verdict.word}**" if verdict.p < SURE else verdict.word
        line += [f"{verdict.difference:+.4f}", f"{verdict.p:.3f}", f"{verdict.p_level:.3f}", word]
    state = "" if row.state_bytes is None else f"{row.state_bytes / 1e6:.3f}"
    return [*line, _chosen(row), state]


def _chosen(row: Row) -> str:
    edges = {edge.split()[0] for edge in row.edges}
    return ", ".join(
        f"{name.replace('_', ' ')} {value:g}{'†' * (name in edges)}" for name, value in row.chosen
    )
