"""How well networks are trained: MNIST."""

from __future__ import annotations

from typing import Any

from benchmarks.significance import holm
from benchmarks.tables.markdown import markdown, p_value

__all__ = ["against_baseline", "mnist"]

SURE = 0.05

MNIST = """## MNIST, two epochs

`neurms bench mnist`: a 784-512-512-10 ReLU network, batch 128, cosine schedule, 2 epochs. The
learning rate of each method is the best of the same grid on held-out training images; test accuracy
is the mean over {seeds} seeds, compared with AdamW seed by seed (difference in points, p of a
paired t-test after Holm's correction). [On another machine](again.md) the same was run
again.

{table}

{verdict}
"""


def mnist(content: dict[str, Any]) -> str:
    """Return the MNIST section."""
    gaps = against_baseline(content)
    lines = []
    for row in content["summary"]:
        gap = gaps.get(row["method"])
        lines.append(
            [
                row["method"],
                f"{row['lr']:g}",
                f"{row['mean']:.4f}",
                f"{row['std']:.4f}",
                f"{gap[0]:+.2f}" if gap else "",
                p_value(gap[1]) if gap else "",
                f"{row['cpu_seconds']:.1f}",
            ]
        )
    header = ["method", "lr", "test accuracy", "std", "minus AdamW", "p", "CPU s"]
    return MNIST.format(
        seeds=len(content["summary"][0]["scores"]),
        table=markdown(header, lines),
        verdict=_verdict(gaps),
    )


def against_baseline(content: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Return by method the difference from AdamW, in points, and its p after Holm's correction."""
    rows = [row for row in content["summary"] if row.get("against_baseline")]
    corrected = holm([row["against_baseline"]["p"] for row in rows])
    return {
        row["method"]: (100 * row["against_baseline"]["difference"], p)
        for row, p in zip(rows, corrected, strict=True)
    }


def _verdict(gaps: dict[str, tuple[float, float]]) -> str:
    """Say who can be told apart from AdamW."""
    level = [name for name, (_, p) in gaps.items() if p >= SURE]
    ahead = [name for name, (points, p) in gaps.items() if p < SURE and points > 0]
    behind = [name for name, (points, p) in gaps.items() if p < SURE and points < 0]
    parts = [
        f"{verb} AdamW here: {'; '.join(names)}."
        for verb, names in (
            ("Significantly ahead of", ahead),
            ("Not told apart from", level),
            ("Significantly behind", behind),
        )
        if names
    ]
    return " ".join(parts)
