"""Run files, written as a training goes on."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from io import TextIOBase
from pathlib import Path
from typing import Any

from neurms.report.report import ProfilerReport
from neurms.report.runs import RUN_FILE, Logged, Run, RunFileError, plain, preamble, read_run

__all__ = ["PAGE", "RunWriter"]

PAGE = "report.html"
"""Name of the page that is put beside a run file at the end of a run."""


class RunWriter:
    """Appends to a run file, a line for each step that was looked at.

    A training is worth more than its profile: what cannot be written any more is said once, as a
    warning, and the training goes on.

    Args:
        path: The run file.
        stream: It, open for writing.
        earlier: What a run that goes on has looked at before.
    """

    def __init__(self, path: Path, stream: TextIOBase, earlier: list[dict[str, Any]]) -> None:
        self.path = path
        self.earlier = earlier
        self.earlier_logged: Logged = {}
        self.page: Path | None = None
        """The page beside the run file, once it is written."""
        self._stream: TextIOBase | None = stream
        self._described: Any = None

    @classmethod
    def opened(
        cls,
        output: str | Path,
        header: dict[str, Any],
        *,
        first_step: int = 0,
        overwrite: bool = False,
    ) -> RunWriter:
        """Begin a run file in ``output``, or go on with the newest one there.

        A training that begins at step 0 is a new run. Where ``output`` holds one already, it gets a
        folder of its own, ``output-2``, ``output-3``, ...; with ``overwrite`` it takes the place of
        the one in ``output``. A training that begins later was resumed and appends to the newest
        run, if that can be read and is of the same layers; what that run saw from ``first_step`` on
        is read no more, for it is done again.

        Args:
            output: The folder.
            header: What the run is.
            first_step: The step that the training begins with.
            overwrite: Whether a new run replaces the one in ``output``.

        Raises:
            OSError: The folder cannot be made or written.
        """
        folders = _folders(Path(output))
        newest, free = None, next(folders)
        while (free / RUN_FILE).exists():
            newest, free = free, next(folders)
        try:
            before = _read_if_whole(newest) if newest and first_step else None
            if newest and before and before.header["layers"].keys() == header["layers"].keys():
                return cls._resumed(newest / RUN_FILE, before, header, first_step)
            folder = Path(output) if overwrite else free
            folder.mkdir(parents=True, exist_ok=True)
            stream = (folder / RUN_FILE).open("w" if overwrite else "x", encoding="utf-8")
        except OSError as error:
            raise type(error)(
                error.errno,
                f"output={str(output)!r} cannot be written ({error.strerror}); name another "
                "folder, or leave output out and save profiler.report() later",
            ) from error
        writer = cls(folder / RUN_FILE, stream, [])
        writer._write(preamble(header))
        writer._described = header
        return writer

    @classmethod
    def _resumed(cls, path: Path, run: Run, header: dict[str, Any], first_step: int) -> RunWriter:
        # A crash leaves half a line, after which nothing could be read.
        whole = path.read_bytes().rpartition(b"\n")
        stream = path.open("a", encoding="utf-8")
        stream.truncate(len(whole[0]) + len(whole[1]))
        writer = cls(path, stream, [s for s in run.samples if s["step"] < first_step])
        writer.earlier_logged = run.logged
        writer._write({"header": header, "resumed": first_step})
        writer._described = header
        return writer

    def add(self, sample: dict[str, Any], header: dict[str, Any]) -> None:
        """Append one sample, and the header if what it says has changed since."""
        changed = plain(header) != plain(self._described)
        self._described = json.loads(json.dumps(plain(header)))
        self._write({"header": header, "sample": sample} if changed else {"sample": sample})

    def log(self, points: Mapping[str, Sequence[tuple[int, float]]]) -> None:
        """Append points of what the training logged."""
        self._write({"logged": points})

    def close(self, report: ProfilerReport) -> None:
        """Write the end of the run, close the file and put the page beside it."""
        self._write({"totals": report.run.totals})
        page = self.path.with_name(PAGE)
        self._tried(lambda stream: report.to_html(page))
        if self._stream is not None:
            self.page = page
            self._stream.close()
            self._stream = None

    def _write(self, line: dict[str, Any]) -> None:
        def written(stream: TextIOBase) -> None:
            stream.write(json.dumps(plain(line), allow_nan=False) + "\n")
            stream.flush()

        self._tried(written)

    def _tried(self, work: Callable[[TextIOBase], None]) -> None:
        if self._stream is None:
            return
        try:
            work(self._stream)
        except (OSError, ValueError) as error:
            stream, self._stream = self._stream, None
            with suppress(OSError, ValueError):
                stream.close()
            warnings.warn(
                f"the profile can no longer be written to {str(self.path)!r} ({error}); training "
                "goes on, and profiler.report() still holds everything",
                UserWarning,
                stacklevel=4,
            )


def _read_if_whole(folder: Path) -> Run | None:
    with suppress(RunFileError):
        return read_run(folder, partial=True)
    return None


def _folders(output: Path) -> itertools.chain[Path]:
    """Yield ``output``, ``output-2``, ``output-3``, ..."""
    named = output if output.name.strip(".") else output.resolve()
    siblings = (named.with_name(f"{named.name}-{number}") for number in itertools.count(2))
    return itertools.chain([output], siblings)
