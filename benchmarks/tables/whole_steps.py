"""Whole training steps against torch's fused SGD: of a compiled perceptron, of ResNet-20."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.tables.markdown import markdown
from benchmarks.tables.provenance import made_by

__all__ = ["compiled", "images"]

Runs = Mapping[str, Mapping[str, Mapping[str, Any]]]

COMPILED = """## A compiled model's step

`neurms bench compiled_step`: forward and backward of a model under `torch.compile(fullgraph=True)`
and a plain step, against the same with torch's fused SGD. Over 200 steps with a schedule and
evaluations in between, {counts}.

{table}

{made}
"""

IMAGES = """## ResNet-20's step

`neurms bench step_images`: forward, backward and update, against torch's fused SGD.

{table}

{made}
"""


def compiled(content: dict[str, Any]) -> str:
    """Return the section on compiled models."""
    runs: Runs = content["runs"]
    rows = [row for run in runs.values() for row in run.values()]
    counts = ", ".join(
        f"{_range(row[what] for row in rows)} {what}"
        for what in ("graphs", "breaks", "recompilations")
    )
    return COMPILED.format(counts=counts, table=_table(runs), made=made_by(content))


def images(content: dict[str, Any]) -> str:
    """Return the section on a convolutional network."""
    return IMAGES.format(table=_table(content["runs"]), made=made_by(content))


def _table(runs: Runs) -> str:
    names = list(dict.fromkeys(name for run in runs.values() for name in run))
    lines = [
        [name, *(f"x{run[name]['ratio']:.3f}" if name in run else "" for run in runs.values())]
        for name in names
    ]
    return markdown(["optimizer", *runs], lines)


def _range(counts: Iterable[int]) -> str:
    found = sorted(set(counts))
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"
