"""What a table of layers shows, in a terminal and on a page alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from neurms.report.advice import advise
from neurms.report.formats import bytes_text, number, percent, time_text
from neurms.report.rows import LayerRow
from neurms.report.summary import Summary

__all__ = ["COLUMNS", "DECISIVE", "cells", "profiled", "totals"]

COLUMNS: dict[str, Callable[[LayerRow], str]] = {
    "layer": lambda row: row.layer,
    "kind": lambda row: row.kind,
    "shape": lambda row: "x".join(map(str, row.shape)),
    "rule": lambda row: row.rule,
    "rows": lambda row: f"{row.rows:,}",
    "time": lambda row: time_text(row.total_us),
    "forward": lambda row: time_text(row.forward_us),
    "backward": lambda row: time_text(row.backward_us),
    "D^T H": lambda row: time_text(row.gemm_us),
    "reduce": lambda row: time_text(row.reduce_us),
    "scale": lambda row: time_text(row.scale_us),
    "update": lambda row: time_text(row.update_us),
    "bookkeeping": lambda row: time_text(row.bookkeeping_us),
    "overhead": lambda row: percent(row.overhead),
    "law": lambda row: percent(row.predicted_overhead),
    "rho": lambda row: number(row.rho),
    "exact": lambda row: number(row.rho_expected),
    "rho batch": lambda row: number(row.rho_batch),
    "rho gradient": lambda row: number(row.rho_gradient),
    "error": lambda row: number(row.factorization_error),
    "r_avg": lambda row: number(row.dominance.r_avg if row.dominance else None),
    "r_min": lambda row: number(row.dominance.r_min if row.dominance else None),
    "r_max": lambda row: number(row.dominance.r_max if row.dominance else None),
    "dead": lambda row: number(row.dead_units),
    "clipped": lambda row: number(row.clipped_units),
    "kept energy": lambda row: percent(row.subspace_energy),
    "limited": lambda row: percent(row.limiter_hits),
    "state": lambda row: bytes_text(row.state_bytes),
    "predicted": lambda row: bytes_text(row.predicted_state_bytes),
}
"""Heading -> text; ``exact`` is the rho that exact factors would typically show."""

DECISIVE = (
    "layer", "advice", "overhead", "rho", "exact", "time", "reduce", "scale", "law", "r_avg",
    "clipped", "state", "rule", "shape",
)  # fmt: skip
"""What a page shows before all the others are asked for."""


def cells(report: Summary, names: Sequence[str]) -> list[list[str]]:
    """Return the text of each layer in some columns, ``"advice"`` among them.

    Args:
        report: The report.
        names: The columns.
    """
    rules: dict[str, str] = {advice.layer: advice.rule for advice in advise(report)}
    found = COLUMNS | {"advice": lambda row: rules[row.layer]}
    return [[found[name](row) for name in names] for row in report]


def profiled(report: Summary) -> str:
    """Return how many of the run's steps were looked at."""
    return f"{len(report.steps)} of {report.run.totals.get('steps', '?')} steps profiled"


def totals(report: Summary) -> dict[str, str]:
    """Return what was measured of the run as a whole: name -> text."""
    milliseconds = {"step": report.step_ms, "looking at a step costs": report.profiler_ms}
    times = {k: time_text(None if ms is None else ms * 1e3) for k, ms in milliseconds.items()}
    return times | {
        "samples/s": number(report.samples_per_second),
        "overhead": percent(report.overhead),
        "with bookkeeping": percent(report.overhead_with_bookkeeping),
        "mean rho": number(report.rho),
        "optimizer state": bytes_text(report.state_bytes),
        "resident": bytes_text(report.rss_bytes),
        "peak": bytes_text(report.peak_rss_bytes),
    }
