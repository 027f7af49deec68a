"""Ways to the moments of variant P."""

from __future__ import annotations

from typing import Any

from benchmarks.tables.markdown import markdown
from benchmarks.tables.provenance import made_by
from benchmarks.zero_adapter import WAYS

TEXT = """## Ways to variant P's moments

`neurms bench zero_adapter`: time of one linear layer's forward and backward with each way to the
row and column sums of G's squares, against forward and backward alone, {threads} threads, {probes}
probes. The zero adapter is W + A Zᵀ + Y Bᵀ at A = B = 0, whose gradients autograd makes.

{table}

{made}
"""


def zero_adapter(content: dict[str, Any]) -> str:
    """Return the section on ways to the moments."""
    runs, settings = content["runs"], content["settings"]
    lines = [[way, *(f"x{run[way]['ratio']:.2f}" for run in runs.values())] for way in WAYS]
    table = markdown(["", *runs], lines)
    made = made_by(content)
    return TEXT.format(table=table, made=made, **settings)
