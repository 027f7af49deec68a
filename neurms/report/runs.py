"""Run files: what they hold, read back whole or with what was saved of them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from neurms.core.ground.errors import NeurmsError

__all__ = [
    "RUN_FILE",
    "Logged",
    "NoRunFileError",
    "Run",
    "RunFileError",
    "logged_on",
    "plain",
    "preamble",
    "read_run",
]

RUN_FILE = "run.jsonl"
"""Name of the run file in an output folder."""

Logged: TypeAlias = dict[str, list[tuple[int, float]]]
"""What a training logged: name -> points of (step, value)."""

_FORMAT = "neurms-profile"
_VERSION = 1


class RunFileError(NeurmsError, ValueError):
    """A run file is damaged, unfinished where that matters, or no run file at all."""


class NoRunFileError(RunFileError):
    """A file holds something else than a profiled run."""


@dataclass
class Run:
    """A profiled training.

    Args:
        header: Model, optimizer, environment, and the layers' constant properties.
        samples: One entry for each step that was looked at.
        totals: Steps, step time and memory forecasts; empty for a run that was cut off.
        finished: Whether the run came to its end.
        logged: What the training logged: name -> points of (step, value).
        path: What it was read from, or None.
    """

    header: dict[str, Any]
    samples: list[dict[str, Any]]
    totals: dict[str, Any] = field(default_factory=dict)
    finished: bool = True
    logged: Logged = field(default_factory=dict)
    path: Path | None = None

    def dumps(self) -> str:
        """Return the run as one JSON document."""
        content = preamble(self.header) | {"samples": self.samples, "totals": self.totals}
        content["logged"] = self.logged
        return json.dumps(plain(content), indent=None, separators=(",", ":"), allow_nan=False)


def preamble(header: dict[str, Any]) -> dict[str, Any]:
    """Return what a run file begins with."""
    return {"format": _FORMAT, "version": _VERSION, "header": header}


def read_run(path: str | Path, *, partial: bool = False) -> Run:
    """Read a run back.

    Args:
        path: An output folder, its run file, or what ``report.to_json`` wrote.
        partial: Take what can be read of a run file that is cut off in the middle of a line.

    Raises:
        FileNotFoundError: There is no such file.
        RunFileError: The file is cut off.
        NoRunFileError: It holds something else.
    """
    path = Path(path)
    file = path / RUN_FILE if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"{str(file)!r} does not exist; give the folder that the profiler wrote to "
            f"(output=...), its {RUN_FILE}, or a file written by report.to_json"
        )
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise NoRunFileError(_no_run(file)) from None
    first, _, rest = text.partition("\n")
    if not _begins_as_run(first):
        raise NoRunFileError(_no_run(file))
    run = _from_lines(text, file, partial) if rest.strip() else _from_document(first, file)
    run.path = path
    return run


def _from_document(text: str, file: Path) -> Run:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise RunFileError(
            f"{str(file)!r} is cut off or damaged (character {error.pos:,} of {len(text):,}: "
            f"{error.msg}); if the run had an output folder, its {RUN_FILE} may still hold it"
        ) from error
    _check_format(content, file)
    if "samples" not in content:
        # A run file of which there is only the first line.
        return Run(_revived(content["header"]), [], finished=False)
    parts = (_revived(content[key]) for key in ("header", "samples", "totals"))
    run = Run(*parts)
    _log(run, content.get("logged", {}))
    return run


def _from_lines(text: str, file: Path, partial: bool) -> Run:
    lines = text.splitlines()
    run = Run({}, [], finished=False)
    before: tuple[Logged, int] = {}, 0
    for number, line in enumerate(lines, start=1):
        try:
            content = json.loads(line)
        except json.JSONDecodeError as error:
            if partial and run.header:
                break
            raise RunFileError(
                f"{str(file)!r} is cut off or damaged in line {number} of {len(lines)}, after "
                f"{len(run.samples)} profiled steps; read those with partial=True "
                "(neurms report --partial)"
            ) from error
        if number == 1:
            _check_format(content, file)
        run.header = _revived(content.get("header", run.header))
        if "resumed" in content:
            # What the run did after its checkpoint, before it was cut off, is done again.
            run.samples = [s for s in run.samples if s["step"] < content["resumed"]]
            run.totals, run.finished = {}, False
            run.logged = logged_on(*before, run.logged)
            before, run.logged = (run.logged, int(content["resumed"])), {}
        if "sample" in content:
            run.samples.append(_revived(content["sample"]))
        _log(run, content.get("logged", {}))
        if "totals" in content:
            run.totals, run.finished = _revived(content["totals"]), True
    run.logged = logged_on(*before, run.logged)
    return run


def logged_on(earlier: Logged, step: int, later: Logged) -> Logged:
    """Return what a run logged before it was resumed at ``step``, and what it logged since.

    What was logged after the checkpoint is logged again, and counts once. At ``step`` itself stand
    both the metrics that the checkpoint came with and the loss that comes next: the earlier ones
    give way to later ones of the same name.
    """
    found = {}
    for name in dict.fromkeys((*earlier, *later)):
        since = later.get(name, [])
        again = bool(since) and since[0][0] <= step
        found[name] = [p for p in earlier.get(name, []) if p[0] <= step - again] + since
    return found


def _log(run: Run, logged: Mapping[str, Sequence[tuple[int, float | None]]]) -> None:
    for name, points in logged.items():
        # JSON has no NaN; see plain().
        read = [(int(step), math.nan if v is None else float(v)) for step, v in points]
        run.logged.setdefault(name, []).extend(read)


def _check_format(content: Any, file: Path) -> None:
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise NoRunFileError(_no_run(file))
    if content.get("version") != _VERSION:
        raise RunFileError(
            f"{str(file)!r} has version {content.get('version')!r} of the run format, and this "
            f"neurms reads version {_VERSION}; read it with the neurms that wrote it"
        )


def _begins_as_run(text: str) -> bool:
    """Return whether a text may be a run, whole or cut off, for which it has to begin as one."""
    start = "".join(text[:80].split())
    begins = f'{{"format":"{_FORMAT}"'
    return bool(start) and (start.startswith(begins) or begins.startswith(start))


def _no_run(file: Path) -> str:
    return (
        f"{str(file)!r} is not a run file of the profiler; give the folder that it wrote to "
        f"(output=...), its {RUN_FILE}, or a file written by report.to_json"
    )


def plain(value: Any) -> Any:
    """Return JSON's form of a value: infinities as strings, since JSON has no numbers for them.

    Seven digits are more than a measurement has, and make the files half as long.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, dict):
        # What was not measured is left out: every reader asks with .get().
        return {str(k): plain(entry) for k, entry in value.items() if entry is not None}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _revived(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _revived(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_revived(entry) for entry in value]
    return math.inf if value == "inf" else -math.inf if value == "-inf" else value
