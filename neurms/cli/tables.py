"""The demo's figures as a table and words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from neurms.cli.methods import Method
from neurms.cli.timing import StepTime
from neurms.cli.training import Outcome
from neurms.report.formats import bytes_text

__all__ = ["cells", "comparison", "footnote"]


def cells(
    methods: Sequence[Method], outcomes: Sequence[Outcome], times: Sequence[StepTime], figure: str
) -> list[list[str]]:
    """Return a header, and a line for each method."""
    header = ["optimizer", "lr", figure, "state", "ms/step", f"vs {methods[0].title}"]
    return [header] + [
        [
            method.title,
            f"{method.lr:g}",
            _figure(outcome.figure, figure),
            bytes_text(outcome.state_bytes),
            f"{step.milliseconds:.1f}",
            f"{step.ratio:.2f}x",
        ]
        for method, outcome, step in zip(methods, outcomes, times, strict=True)
    ]


def _figure(value: float, figure: str) -> str:
    if math.isnan(value):
        return "diverged"
    return f"{value:.2%}" if figure == "accuracy" else f"{value:.3f}"


def comparison(found: Sequence[Sequence[str]]) -> Table:
    """Return the lines of :func:`cells` as a table for a terminal."""
    header, *rows = found
    table = Table(
        title="Same network, seed, steps and batches", title_justify="left", box=SIMPLE_HEAD
    )
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def footnote(environment: Mapping[str, Any], seconds: float) -> str:
    """Return how the figures were taken, and what they are worth."""
    threads, flushed = environment["threads"], environment["denormals_flushed"]
    return (
        "One seed on a tiny task: an illustration, no ranking. Another seed may turn neighbours "
        "around; the project's results page has comparisons with several seeds and tests.\n"
        "State: bytes held after the last step. Step: median of interleaved rounds, "
        f"{threads} thread{'s' if threads > 1 else ''}, denormals {'' if flushed else 'not '}"
        "flushed; torch's optimizers run fused. In a network this small, calls cost more than "
        f"arithmetic.\nAll of it measured in this run, in {seconds:.0f} s."
    )
