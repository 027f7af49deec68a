"""What every benchmark shares: a record of its environment, results that outlive a kill."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from neurms.cli.environment import environment, flush_denormals

RESULTS = Path(__file__).parent / "results"


class Results:
    """A JSON file of finished runs; a run that is in it already is not repeated.

    Args:
        path: Where the file is, or will be.
        settings: What all runs share. A file with other settings is refused, because its runs could
            not be compared with the new ones.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {"settings": settings, "runs": {}}
        if path.is_file():
            self._resume(json.loads(path.read_text()), settings)
        self._record = {
            "command": " ".join(
                ["neurms bench", Path(sys.argv[0]).stem.split()[-1], *sys.argv[1:]]
            ),
            "environment": environment(denormals_flushed=flush_denormals()),
        }
        for key, value in self._record.items():
            self.content.setdefault(key, value)

    def _resume(self, found: dict[str, Any], settings: dict[str, Any]) -> None:
        # Through JSON and back: tuples and lists are the same thing in a file.
        if found.get("settings") != json.loads(json.dumps(settings)):
            raise SystemExit(
                f"error: {self.path} holds runs with other settings; move it away, or "
                "name another file with --out"
            )
        self.content.update(found)

    @property
    def runs(self) -> dict[str, Any]:
        """The finished runs by key."""
        runs: dict[str, Any] = self.content["runs"]
        return runs

    def run(self, key: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the run's result, computing and saving it if it is not there."""
        if key not in self.runs:
            self.runs[key] = work()
            self.save()
            print(f"  {key}: {_brief(self.runs[key])}", flush=True)
        result: dict[str, Any] = self.runs[key]
        return result

    def save(self, **extra: Any) -> None:
        """Write the file, with ``extra`` entries beside the runs."""
        self.content.update(extra)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n")
        partial.replace(self.path)


def paired(first: Sequence[float], second: Sequence[float]) -> dict[str, float]:
    """Return the mean difference of two equally seeded series and its paired t-test's p value."""
    from scipy.stats import ttest_rel

    difference = sum(a - b for a, b in zip(first, second, strict=True)) / len(first)
    p = float(ttest_rel(first, second).pvalue) if len(first) > 1 else float("nan")
    return {"difference": difference, "p": p}


def _brief(run: dict[str, Any]) -> str:
    """Return a run in one line: of a curve only its last point."""
    shown = {k: v[-1] if k == "curve" and v else v for k, v in run.items()}
    return str(shown)
