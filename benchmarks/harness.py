"""What every benchmark shares: a record of its environment, results that outlive a kill."""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from neurms.cli.environment import environment, flush_denormals

RESULTS = Path(__file__).parent / "results"


class Results:
    """A JSON file of finished runs; a run that is in it already is not repeated.

    Several processes may write the same file: each saves its own runs beside what it finds there.

    Args:
        path: Where the file is, or will be.
        settings: What all runs share. A file whose settings contradict them is refused, because its
            runs could not be compared with the new ones; settings that only one of them has, such
            as those of a method added since, are kept from both.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        # Through JSON and back: tuples and lists are the same thing in a file.
        settings = json.loads(json.dumps(settings))
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
        self._progress: Progress | None = None

    def _resume(self, found: dict[str, Any], settings: dict[str, Any]) -> None:
        self.content.update(found, settings=self._with(found, settings))

    def _with(self, found: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
        """Return settings with those of the file, which must not contradict them."""
        merged: dict[str, Any] | None = _merged(found.get("settings"), settings)
        if merged is None:
            raise SystemExit(
                f"error: {self.path} holds runs with other settings; move it away, or "
                "name another file with --out"
            )
        return merged

    @property
    def runs(self) -> dict[str, Any]:
        """The finished runs by key."""
        runs: dict[str, Any] = self.content["runs"]
        return runs

    @property
    def made(self) -> dict[str, Any]:
        """The environment of the runs that this process makes."""
        environment: dict[str, Any] = self._record["environment"]
        return environment

    def reload(self) -> None:
        """Take up the runs that other processes have saved since."""
        if self.path.is_file():
            self.content["runs"] = {**json.loads(self.path.read_text())["runs"], **self.runs}

    def expect(self, cost: float) -> None:
        """Announce what all runs to come cost together, for the estimate of the time left."""
        self._progress = Progress(cost)

    def run(
        self, key: str, work: Callable[[], dict[str, Any]], cost: float = 1.0
    ) -> dict[str, Any]:
        """Return the run's result, computing and saving it if it is not there.

        Args:
            key: Names the run.
            work: Computes it.
            cost: Its share of what :meth:`expect` was told.
        """
        known = key in self.runs
        if not known:
            self.runs[key] = work()
            self.save()
        left = "" if self._progress is None else self._progress.after(cost, worked=not known)
        if not known:
            print(f"  {left}{key}: {_brief(self.runs[key])}", flush=True)
        result: dict[str, Any] = self.runs[key]
        return result

    def save(self, **extra: Any) -> None:
        """Write the file, with ``extra`` entries beside the runs."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self.path.parent):
            if self.path.is_file():
                # What another process has saved since stays.
                found = json.loads(self.path.read_text())
                runs = {**found["runs"], **self.runs}
                settings = self._with(found, self.content["settings"])
                own = {"settings": settings, "runs": runs}
                self.content = {**self.content, **found, **own}
            self.content.update(extra)
            made = self._record["environment"]
            for key, own in (("commits", made["commit"]), ("machines", made["machine"])):
                # The first environment stands for a file from before there was such a list.
                known = self.content.setdefault(key, [self.content["environment"][key[:-1]]])
                if own not in known:
                    known.append(own)
            partial = self.path.with_suffix(f".{os.getpid()}.partial")
            partial.write_text(json.dumps(self.content, indent=1) + "\n")
            partial.replace(self.path)


class Progress:
    """How much of a sweep is done, and an estimate of what is left from what was worked so far."""

    def __init__(self, cost: float) -> None:
        self._cost = cost
        self._done = self._worked = 0.0
        self._start = time.monotonic()

    def after(self, cost: float, *, worked: bool) -> str:
        """Count a run, worked or found in the file, and return the state of things as text."""
        self._done += cost
        self._worked += cost if worked else 0.0
        if not self._worked:
            return ""
        rate = (time.monotonic() - self._start) / self._worked
        left = max(0.0, self._cost - self._done) * rate
        return f"[{min(1.0, self._done / self._cost):.0%}, {left / 60:.0f} min left] "


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    # The folder itself is locked, so that no lock file stays behind.
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _merged(found: Any, asked: Any) -> Any:
    """Return both settings as one, None where they contradict each other."""
    if not (isinstance(found, dict) and isinstance(asked, dict)):
        return asked if found == asked else None
    merged = {**found, **asked}
    for name in found.keys() & asked.keys():
        if found[name] != asked[name]:
            merged[name] = _merged(found[name], asked[name])
            if merged[name] is None:
                return None
    return merged


def _brief(run: dict[str, Any]) -> str:
    """Return a run in one line: of a curve only its last point."""
    shown = {k: v[-1] if k == "curve" and v else v for k, v in run.items()}
    return str(shown)
