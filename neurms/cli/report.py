"""``neurms report``: a profiled run from its files, or two of them side by side."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from neurms.callbacks.profiler.report import ProfilerReport
from neurms.callbacks.profiler.table import comparison_table

__all__ = ["show"]


def show(
    run: Path, other: Path | None, *, html: Path | None, csv: Path | None, partial: bool
) -> int:
    """Print a run's table and advice, or two runs' comparison; write the files asked for.

    Args:
        run: The run.
        other: A second run, or None.
        html: Where the first run's page goes, or None.
        csv: Where the first run's rows go, or None.
        partial: Take what can be read of a run file that is cut off.

    Returns:
        The exit code, 1 if a file is not there or cannot be written.

    Raises:
        RunFileError: A file is damaged or holds something else.
    """
    try:
        _show(run, other, {"html": html, "csv": csv}, partial)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _show(run: Path, other: Path | None, files: Mapping[str, Path | None], partial: bool) -> None:
    console = Console()
    report = ProfilerReport.read(run, partial=partial)
    if other is not None:
        console.print(comparison_table(report, ProfilerReport.read(other, partial=partial)))
    else:
        console.print(report.table())
        for advice in report.advice():
            console.print(str(advice), markup=False, highlight=False)
        if not report.run.finished:
            console.print("The run was cut off: totals of its end are missing.")
    for kind, path in files.items():
        if path is not None:
            getattr(report, f"to_{kind}")(path)
            console.print(f"written: {path}", markup=False, highlight=False)
