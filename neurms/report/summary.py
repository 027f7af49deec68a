"""What a run file says: rows, one for each layer, and numbers of the run as a whole."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import overload

from neurms.report.rows import LayerRow, rows_of
from neurms.report.runs import RUN_FILE, Run

__all__ = ["Summary"]


class Summary(Sequence[LayerRow]):
    """Rows, one for each layer, and what was measured of the whole process.

    Args:
        run: The profiled run.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._rows = rows_of(run.header.get("layers", {}), run.samples)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> LayerRow: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[LayerRow]: ...
    def __getitem__(self, index: int | slice) -> LayerRow | Sequence[LayerRow]:
        return self._rows[index]

    def __iter__(self) -> Iterator[LayerRow]:
        return iter(self._rows)

    @property
    def name(self) -> str:
        """Name of the folder or file that the run was read from, else of its optimizer."""
        path = self.run.path
        if path is None:
            return str(self.run.header.get("optimizer", "run"))
        return path.resolve().parent.name if path.name == RUN_FILE else path.resolve().name

    # ---------------------------------------------------------------- totals

    @property
    def steps(self) -> list[int]:
        """Numbers of the steps that were looked at, counted from 0."""
        return [int(sample["step"]) for sample in self.run.samples]

    @property
    def rss_bytes(self) -> int | None:
        """Resident memory at the last profiled step."""
        return self._last("rss_bytes")

    @property
    def peak_rss_bytes(self) -> int | None:
        """Peak of the resident memory."""
        return self._last("peak_rss_bytes")

    @property
    def device_peak_bytes(self) -> int | None:
        """Peak of the accelerator's memory, None without one."""
        return self._last("device_peak_bytes")

    @property
    def state_bytes(self) -> int | None:
        """Measured bytes of all optimizer state."""
        return self._last("state_bytes")

    @cached_property
    def step_ms(self) -> float | None:
        """Median milliseconds of a step that was not looked at (of one that was, if all were)."""
        plain = self.run.totals.get("step_ms")
        return float(plain) if plain is not None else self.profiled_step_ms

    @cached_property
    def profiled_step_ms(self) -> float | None:
        """Median milliseconds of a step that was looked at, the profiler's own work included."""
        return self._median("step_ms")

    @cached_property
    def profiler_ms(self) -> float | None:
        """Median milliseconds that looking at a step cost."""
        return self._median("profiler_ms")

    @property
    def samples_per_second(self) -> float | None:
        """Batch rows of the first layer, per second of a step that was not looked at."""
        batch = self._median("batch")
        return batch / self.step_ms * 1e3 if batch and self.step_ms else None

    @property
    def rho(self) -> float | None:
        """Mean of the layers' rho."""
        found = [row.rho for row in self if row.rho is not None]
        return statistics.fmean(found) if found else None

    @property
    def overhead(self) -> float | None:
        """(reduce + scale) / time, over all layers together."""
        total = sum(row.total_us for row in self)
        return sum(row.reduce_us + row.scale_us for row in self) / total if total else None

    @property
    def overhead_with_bookkeeping(self) -> float | None:
        """The same with what calls the kernels, in the layers and in the optimizer as a whole."""
        total = sum(row.total_us for row in self)
        spent = sum(row.reduce_us + row.scale_us + row.bookkeeping_us for row in self)
        outside = self.bookkeeping_us or 0.0
        return (spent + outside) / (total + outside) if total else None

    @cached_property
    def bookkeeping_us(self) -> float | None:
        """Median time of an optimizer's step that belongs to no layer: checks, loops, schedules.

        None for other libraries' optimizers, whose step is shared out whole.
        """
        return self._median("bookkeeping_us")

    def history(self, layer: str, key: str) -> list[tuple[int, float]]:
        """Return (step, value) of one of a layer's numbers over the profiled steps.

        Args:
            layer: The layer's name.
            key: Such as ``"rho"``, ``"factorization_error"`` or ``"reduce_us"``.

        Raises:
            KeyError: The run has no such layer.
        """
        if layer not in self.run.header["layers"]:
            raise KeyError(
                f"layer={layer!r} was not profiled; layers are {[r.layer for r in self]}"
            )
        values = [(int(s["step"]), s["layers"].get(layer, {}).get(key)) for s in self.run.samples]
        # NaN (a constant on one side) is the only number that is not itself.
        return [(step, float(v)) for step, v in values if v is not None and v == v]

    # ---------------------------------------------------------------- helpers

    def _last(self, key: str) -> int | None:
        found = [s[key] for s in self.run.samples if s.get(key) is not None]
        return int(found[-1]) if found else None

    def _median(self, key: str) -> float | None:
        found = [float(s[key]) for s in self.run.samples if s.get(key) is not None]
        return statistics.median(found) if found else None
