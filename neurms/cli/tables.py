"""The demo's figures as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from neurms.cli.methods import Method
from neurms.cli.timing import StepTime
from neurms.cli.training import Outcome
from neurms.report.formats import bytes_text

__all__ = ["comparison", "factorization", "footnote"]


def comparison(
    methods: Sequence[Method], outcomes: Sequence[Outcome], times: Sequence[StepTime]
) -> Table:
    """Return accuracy, seconds, state and step time, one row for each method."""
    table = Table(
        title="Same network, budget, seed and batches", title_justify="left", box=SIMPLE_HEAD
    )
    table.add_column("\noptimizer", no_wrap=True)
    sgd = methods[0].optimizer.upper()
    for heading in (
        "\nlr",
        "validation\naccuracy",
        "train\nseconds",
        "state\nbytes",
        "ms per\nstep",
        f"vs\n{sgd}",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for method, outcome, step in zip(methods, outcomes, times, strict=True):
        table.add_row(
            method.title,
            f"{method.lr:g}",
            f"{outcome.accuracy:.2%}",
            f"{outcome.seconds:.1f}",
            bytes_text(outcome.state_bytes),
            f"{step.milliseconds:.2f}",
            f"{step.ratio:.2f}x",
        )
    return table


def factorization(methods: Sequence[Method], outcomes: Sequence[Outcome]) -> Table:
    """Return rho, one row for each layer and one column for each method."""
    table = Table(
        title="rho: correlation of squared gradient and v (units) x u (features)",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    table.add_column("layer")
    for method in methods:
        table.add_column(method.title, justify="right")
    for layer in outcomes[0].rho:
        table.add_row(layer, *(f"{outcome.rho[layer]:.3f}" for outcome in outcomes))
    return table


def footnote(environment: Mapping[str, Any], width: int, validated: int, seconds: float) -> str:
    """Return how the figures were taken."""
    small = " In a network this small, calls cost more than arithmetic." if width < 512 else ""
    threads, flushed = environment["threads"], environment["denormals_flushed"]
    return (
        f"Accuracy: one run each; a single image is {100 / validated:.2g} points. "
        "State: bytes held after the last step.\n"
        "Step: median of interleaved rounds in a plain loop, "
        f"{threads} thread{'s' if threads > 1 else ''}, denormals "
        f"{'' if flushed else 'not '}flushed; SGD and AdamW are torch's fused kernels.{small}\n"
        "Training seconds include Lightning, validation and the probe of rho. rho: mean over "
        "training; one gradient of normal noise typically shows .58 at most, if v and u fit.\n"
        f"All of it measured in this run, in {seconds:.0f} s."
    )
