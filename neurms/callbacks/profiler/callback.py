"""What the frameworks' profiler callbacks share."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from neurms.callbacks.profiler.engine import Profiler
from neurms.callbacks.profiler.sampling import Sampler
from neurms.callbacks.profiler.schedule import Schedule
from neurms.core.ground.errors import check_fraction
from neurms.core.ground.extras import require
from neurms.report.report import ProfilerReport
from neurms.report.scalars import layer_scalars

__all__ = ["ProfilesTraining"]


class ProfilesTraining:
    """One profiler for each training that a callback is told of, and the table at its end.

    Args:
        call: What begins a training, for a message.
        given: All arguments of the subclass by name, as ``locals()`` holds them: the profiler's
            settings, and ``print_table``.

    Raises:
        ValueError: A setting is out of its range.
    """

    def __init__(self, call: str, given: dict[str, Any]) -> None:
        Schedule(given["every_n_steps"], given["warmup_steps"])
        check_fraction("beta", given["beta"])
        own = ("self", "log", "print_table", "__class__")
        self.settings = {name: value for name, value in given.items() if name not in own}
        self.print_table: bool = given["print_table"]
        self.profiler: Sampler | None = None
        self._call = call
        self._logged = 0

    def report(self) -> ProfilerReport:
        """Return the report of the last training, finished or not.

        Raises:
            RuntimeError: No training has started.
        """
        if self.profiler is None:
            raise RuntimeError(f"PreconditionerProfiler has seen no training yet; {self._call}")
        return self.profiler.report()

    def _begin(
        self, model: nn.Module, optimizers: Sequence[Optimizer], *, writes: bool, **more: Any
    ) -> None:
        """Begin to profile a training; only the rank that ``writes`` has a run file."""
        self._stop()
        settings = self.settings | ({} if writes else {"output": None})
        profiler = Profiler(model, optimizers, **settings, **more)
        self.profiler, self._logged = profiler.attach(), 0

    def _new_scalars(self) -> list[dict[str, float]]:
        """Return the numbers of the steps that were looked at since the last call."""
        if self.profiler is None:
            return []
        new = self.profiler.samples[self._logged :]
        self._logged += len(new)
        return [layer_scalars(sample) for sample in new]

    def _finish(self, *, speaks: bool = True) -> None:
        """End a training well, with a table from the rank that ``speaks``."""
        if self.profiler is None:
            return
        self.profiler.detach()
        if speaks:
            if self.print_table and self.profiler.samples:
                self._print_table()
            self._say_where()

    def _print_table(self) -> None:
        report = self.report()
        try:
            rich: Any = require("rich", extra="report")
        except ImportError as error:
            # A training that has ended well must not fail for want of a table.
            print(f"no table: {error}")
        else:
            rich.print(report.table())
        print(textwrap.fill(report.recommendation(), shutil.get_terminal_size().columns))

    def _say_where(self) -> None:
        page = None if self.profiler is None else self.profiler.page
        if page is not None:
            print(f"report: {page} (neurms report {page.parent} shows it in a terminal)")

    def _stop(self) -> None:
        """End a training that failed, or that nobody ended: take every hook off."""
        if self.profiler is not None and self.profiler.page is None:
            self.profiler.detach(failed=True)
            self._say_where()

    def _keep(self, values: Mapping[str, Any]) -> None:
        """Keep what the framework has logged, but for what comes from this library."""
        if self.profiler is not None:
            for name, value in values.items():
                if not name.startswith("neurms/"):
                    self.profiler.keep(name, value)
