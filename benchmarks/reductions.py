"""How fast sums of squares read a signal, beside a plain copy: columns, and channels of images.

    neurms bench reductions --threads 2

Bytes that must move over the time, in units of what a copy moves in the same turns: 1 is one read
at memory speed. Signals come from memory each time. ``eager`` is the same sum by torch's own
operations, in several passes.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import RESULTS, Results
from neurms.compiled.reductions import channel_square_sum, column_square_sum

IMAGES = ((128, 16, 32, 32), (128, 32, 16, 16), (128, 64, 8, 8), (32, 256, 14, 14))
"""D of the three stages of a CIFAR ResNet, and of an ImageNet one's."""
MATRICES = ((128, 1024), (50_000, 16), (2048, 4096))
FOOTPRINT = 2**28
"""Bytes that take turns: eight times the caches."""

Reduce = Callable[[Tensor], Any]


def cases(dtype: torch.dtype) -> dict[str, tuple[Tensor, Reduce, Reduce]]:
    """Return signals of a dtype by name, each with its native and its eager sum."""
    found: dict[str, tuple[Tensor, Reduce, Reduce]] = {}
    for shape in IMAGES:
        x = torch.randn(shape).to(dtype)
        for memory, y in (
            ("contiguous", x),
            ("channels last", x.to(memory_format=torch.channels_last)),
        ):
            name = f"{'x'.join(map(str, shape))} {memory}"
            found[name] = y, channel_square_sum.on("auto"), channel_square_sum.eager
    for rows, columns in MATRICES:
        x = torch.randn(rows, columns).to(dtype)
        found[f"{rows}x{columns}"] = x, column_square_sum.on("auto"), column_square_sum.eager
    return found


def speeds(x: Tensor, native: Reduce, eager: Reduce, rounds: int) -> dict[str, float]:
    """Return GB/s of a copy and of both sums, and the sums' in units of the copy's."""
    size = x.numel() * x.element_size()
    buffers = [x.clone() for _ in range(max(2, FOOTPRINT // (2 * size)))]
    pairs = itertools.cycle(zip(buffers, [b.clone() for b in buffers], strict=True))
    work: dict[str, tuple[Callable[[Tensor, Tensor], Any], int]] = {
        "copy": (lambda x, out: out.copy_(x), 2 * size),
        "native": (lambda x, out: native(x), size),
        "eager": (lambda x, out: eager(x), size),
    }
    times: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(rounds + 4):
        for name, (run, _) in work.items():
            x, out = next(pairs)
            start = time.perf_counter()
            run(x, out)
            if turn >= 4:
                times[name].append(time.perf_counter() - start)
    found = {
        name: moved / statistics.median(times[name]) / 1e9 for name, (_, moved) in work.items()
    }
    return {**found, **{f"{name} of copy": found[name] / found["copy"] for name in list(found)[1:]}}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, default=RESULTS / "reductions.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    results = Results(given.out, {"footprint": FOOTPRINT})
    for dtype in (torch.float32, torch.bfloat16):
        for name, case in cases(dtype).items():
            key = f"{name}, {str(dtype).removeprefix('torch.')}, {given.threads} threads"
            found = results.runs[key] = speeds(*case, rounds=given.rounds)
            shown = "  ".join(f"{what} {number:.2f}" for what, number in found.items())
            print(f"{key:56}{shown}", flush=True)
    results.save()


if __name__ == "__main__":
    main()
