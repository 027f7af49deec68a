"""The memory benchmark's counter, on allocations whose sizes are known."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import memory


def test_the_peak_is_counted_and_so_is_what_remains() -> None:
    def work() -> Tensor:
        kept = torch.empty(1 << 20)
        for _ in range(3):
            torch.empty(3 << 20)
        return kept

    peak, left = memory._allocated(work)
    assert left == 4 << 20
    assert peak == 16 << 20


def test_the_comparison_is_against_plain_sgd() -> None:
    empty = {"gradient_bytes": 1, "state_bytes": 1, "resident_bytes": 10, "allocated_bytes": 20}
    runs = {name: dict(empty) for name in memory.OPTIMIZERS}
    runs["sgd"] |= {"resident_bytes": 110, "allocated_bytes": 220}
    runs["adamw"]["state_bytes"] = 5
    found = memory.comparison(runs)
    assert found["tapped_gradient_bytes"] == 4 * (1024 * 4096 * 2 + 4096**2)
    assert found["NeuRMS-U backward, resident_bytes below sgd"] == 100
    assert found["NeuRMS-F backward, allocated_bytes below sgd"] == 200
    assert found["adamw over racs"] == 3
