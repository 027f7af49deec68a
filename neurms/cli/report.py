"""``neurms report``: a profiled run from its files, or two of them side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from neurms.cli.errors import UsageError, check_folder
from neurms.report.report import ProfilerReport
from neurms.report.runs import RUN_FILE, NoRunFileError
from neurms.report.tables import ComparisonTable

__all__ = ["show"]


def show(
    run: Path,
    other: Path | None,
    *,
    html: Path | None,
    csv: Path | None,
    partial: bool,
    as_json: bool = False,
) -> int:
    """Print a run's table and advice, or two runs' comparison; write the files asked for.

    Args:
        run: The run.
        other: A second run, or None.
        html: Where the page goes, of the run or of both, or None.
        csv: Where the first run's rows go, or None.
        partial: Take what can be read of a run file that is cut off.
        as_json: Print JSON for machines and nothing else.

    Returns:
        The exit code, 1 if a file cannot be read or written.

    Raises:
        UsageError: A run is not there or is none, or a file is to be written to no folder.
        RunFileError: A run file is damaged.
    """
    for option, path in (("--html", html), ("--csv", csv)):
        check_folder(option, path)
    try:
        _show(run, other, {"html": html, "csv": csv}, partial, as_json)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _show(
    run: Path,
    other: Path | None,
    files: Mapping[str, Path | None],
    partial: bool,
    as_json: bool,
) -> None:
    paths = [run] if other is None else [run, other]
    reports = [_read(path, partial) for path in paths]
    if as_json:
        print(json.dumps([_record(report) for report in reports], indent=1))
    else:
        _print(reports)
    for kind, path in files.items():
        if path is not None:
            if kind == "html" and len(reports) > 1:
                reports[0].compare_to_html(reports[1], path)
            else:
                getattr(reports[0], f"to_{kind}")(path)
            # On the side, so that what is printed stays JSON.
            print(f"written: {path}", file=sys.stderr if as_json else sys.stdout)


def _read(path: Path, partial: bool) -> ProfilerReport:
    if path.is_dir() and not (path / RUN_FILE).is_file():
        raise UsageError(
            f"the folder {str(path)!r} holds no {RUN_FILE}, so it is no run; give the one that the "
            "profiler wrote to (output=...)"
        )
    try:
        return ProfilerReport.read(path, partial=partial)
    except (FileNotFoundError, NoRunFileError) as error:
        raise UsageError(str(error)) from None


def _print(reports: Sequence[ProfilerReport]) -> None:
    console = Console()
    report = reports[0]
    if len(reports) > 1:
        console.print(ComparisonTable(*reports))
        return
    console.print(report.table())
    console.print(report.recommendation(), markup=False, highlight=False)
    for advice in report.advice():
        console.print(str(advice), markup=False, highlight=False)
    if not report.run.finished:
        console.print("The run was cut off: totals of its end are missing.")


def _record(report: ProfilerReport) -> dict[str, Any]:
    return {
        "finished": report.run.finished,
        "layers": [asdict(row) for row in report],
        "recommendation": report.recommendation(),
        "advice": [asdict(advice) for advice in report.advice()],
    }
