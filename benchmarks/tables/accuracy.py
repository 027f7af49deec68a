"""How well networks are trained: MNIST."""

from __future__ import annotations

from typing import Any

from benchmarks.tables.markdown import markdown

MNIST = """## MNIST, two epochs

`neurms bench mnist`: a 784-512-512-10 ReLU network, batch 128, cosine schedule, 2 epochs. The
learning rate of each method is the best of the same grid on held-out training images; test accuracy
is the mean over {seeds} seeds, compared with AdamW seed by seed (difference in points, p of a
paired t-test).

{table}

AdamW, SGD with momentum and NeuRMS-U cannot be told apart here. NeuRMS-F and B stand behind, and U
without momentum does too.
"""


def mnist(content: dict[str, Any]) -> str:
    """Return the MNIST section."""
    lines = []
    for row in content["summary"]:
        against = row.get("against_baseline")
        lines.append(
            [
                row["method"],
                f"{row['lr']:g}",
                f"{row['mean']:.4f}",
                f"{row['std']:.4f}",
                f"{100 * against['difference']:+.2f}" if against else "",
                f"{against['p']:.3f}" if against else "",
                f"{row['cpu_seconds']:.1f}",
            ]
        )
    header = ["method", "lr", "test accuracy", "std", "minus AdamW", "p", "CPU s"]
    return MNIST.format(seeds=len(content["summary"][0]["scores"]), table=markdown(header, lines))
