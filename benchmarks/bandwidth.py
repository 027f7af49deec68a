"""How much of the memory's speed the reducing and scaling kernels draw, beside a plain copy."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from neurms.compiled.reductions import column_square_sum

__all__ = ["SHAPES", "bandwidth"]

SHAPES = ((128, 1024), (2048, 1024), (2048, 4096))
FOOTPRINT = 2**28
"""Bytes of the tensors that take turns: eight times the caches, so that all comes from memory."""


def bandwidth(rows: int, columns: int, threads: int, *, cached: bool) -> dict[str, float]:
    """Return GB/s of a copy, the sums of squares and the scaling of one (rows, columns) buffer.

    Args:
        rows: Rows.
        columns: Units or features.
        threads: Threads.
        cached: Whether the same buffer comes again and again, else it comes from memory each time.
    """
    torch.set_num_threads(threads)
    size = 4 * rows * columns
    count = 1 if cached else FOOTPRINT // size
    buffers = [torch.randn(rows, columns) for _ in range(count)]
    others = [buffer.clone() for buffer in buffers]
    factors = torch.rand(columns)
    # Bytes that must move: a sum reads, a copy and a scaling read and write.
    work: dict[str, tuple[Callable[[Tensor, Tensor], Any], int]] = {
        "copy": (lambda x, out: out.copy_(x), 2 * size),
        "sum": (lambda x, out: x.sum(), size),
        "square sums": (lambda x, out: column_square_sum(x), size),
        "scaling": (lambda x, out: torch.mul(x, factors, out=out), 2 * size),
    }
    times: dict[str, list[float]] = {name: [] for name in work}
    pairs = itertools.cycle(zip(buffers, others, strict=True))
    for turn in range(24):
        for name, (run, _) in work.items():
            x, out = next(pairs)
            if cached:
                run(x, out)
            start = time.perf_counter()
            run(x, out)
            if turn > 3:
                times[name].append(time.perf_counter() - start)
    return {name: moved / statistics.median(times[name]) / 1e9 for name, (_, moved) in work.items()}
