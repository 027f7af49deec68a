"""The report of a profiled run: rows, table, files, advice."""

from __future__ import annotations

import csv
from dataclasses import fields
from pathlib import Path
from typing import Any

from neurms.core.ground.extras import require
from neurms.report.advice import advise
from neurms.report.applied import AdviceList
from neurms.report.comparison import comparison_page
from neurms.report.document import framed
from neurms.report.html import page, title_of
from neurms.report.recommendation import recommendation
from neurms.report.rows import LayerRow
from neurms.report.runs import read_run
from neurms.report.summary import Summary

__all__ = ["ProfilerReport"]


class ProfilerReport(Summary):
    """Rows, one for each layer, the run's totals, and the forms in which people look at them.

    Args:
        run: The profiled run.

    Example:
        >>> import torch, neurms
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)
        ... )
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> with neurms.profile(model, optimizer, every_n_steps=1, warmup_steps=0) as profiler:
        ...     for _ in range(4):
        ...         optimizer.zero_grad()
        ...         model(torch.randn(8, 6)).square().mean().backward()
        ...         optimizer.step()
        >>> report = profiler.report()
        >>> report[0].layer, report[0].state_bytes, len(report.steps)
        ('0', 140, 4)
    """

    @classmethod
    def read(cls, path: str | Path, *, partial: bool = False) -> ProfilerReport:
        """Read a run back, see :func:`~neurms.report.runs.read_run`."""
        return cls(read_run(path, partial=partial))

    def advice(self) -> AdviceList:
        """Return which rule suits which layer, and why; see :func:`advise`.

        ``report.advice().apply(model)`` returns the optimizer that follows from it.
        """
        return AdviceList(advise(self))

    def recommendation(self) -> str:
        """Return what to do, in one sentence."""
        return recommendation(self)

    def __repr__(self) -> str:
        return f"<{title_of(self)}, {len(self)} layers: {self.recommendation()}>"

    def _repr_html_(self) -> str:
        """Return what notebooks show."""
        return framed(page(self), title_of(self))

    def table(self) -> Any:
        """Return a table of the rows that ``rich.print`` shows, fewer columns in narrow terminals.

        Raises:
            ImportError: rich is not installed.
        """
        require("rich", extra="report")
        from neurms.report.tables import LayerTable

        return LayerTable(self)

    def to_csv(self, path: str | Path) -> None:
        """Write the rows; vectors take one column for each entry.

        Raises:
            OSError: The file cannot be written.
        """
        rows = [_flat(row) for row in self]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        with Path(path).open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, columns)
            writer.writeheader()
            writer.writerows(rows)

    def to_json(self, path: str | Path) -> None:
        """Write the whole run, from which :meth:`read` makes this report again.

        Raises:
            OSError: The file cannot be written.
        """
        Path(path).write_text(self.run.dumps() + "\n", encoding="utf-8")

    def to_html(self, path: str | Path) -> None:
        """Write a page that needs nothing beside itself: what to do, plots, table, advice.

        Raises:
            OSError: The file cannot be written.
        """
        Path(path).write_text(page(self), encoding="utf-8")

    def compare_to_html(self, other: ProfilerReport, path: str | Path) -> None:
        """Write a page with this run as A and another as B: losses, totals, layers.

        Raises:
            OSError: The file cannot be written.
        """
        Path(path).write_text(comparison_page(self, other), encoding="utf-8")


def _flat(row: LayerRow) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for entry in fields(row):
        value = getattr(row, entry.name)
        if entry.name == "dominance":
            found = value or (None, None, None, None)
            names = ("r_avg", "r_min", "r_max", "dominance_rows")
            flat |= dict(zip(names, found, strict=True))
        elif entry.name == "steps":
            flat |= {"first_step": value[0], "last_step": value[1]}
        elif entry.name == "shape":
            flat["shape"] = "x".join(map(str, value))
        elif entry.name.endswith("_levels"):
            short = "v" if entry.name.startswith("unit") else "u"
            for name, number in zip(_LEVEL_NAMES, value or (None,) * 7, strict=True):
                flat[f"{short}_{name}"] = number
        else:
            flat[entry.name] = value
    return flat


_LEVEL_NAMES = ("min", "q05", "q25", "median", "q75", "q95", "max")
