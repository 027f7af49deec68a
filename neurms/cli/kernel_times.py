"""What each kernel gets from each backend on this machine, for ``neurms doctor --kernels``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from neurms.compiled.backends import Kernel
from neurms.compiled.finite import GREATEST, within
from neurms.compiled.gemm import scaled_gemm_
from neurms.compiled.moments import move_moments
from neurms.compiled.reductions import column_square_sum
from neurms.compiled.row_update import row_normalized_update_
from neurms.compiled.two_sided import two_sided_fit, two_sided_scales
from neurms.compiled.update import apply_updates_

__all__ = ["BACKENDS_TIMED", "KernelTime", "kernel_times"]

BACKENDS_TIMED = ("eager", "auto", "torchscript")
"""Without ``"inductor"``, which would compile for a minute."""


class KernelTime(NamedTuple):
    """One kernel on one backend: microseconds a call, and how many times eager's that is."""

    kernel: str
    size: int
    backend: str
    microseconds: float
    ratio: float


def kernel_times(
    sizes: Sequence[int] = (128, 1024),
    backends: Sequence[str] = BACKENDS_TIMED,
    rounds: int = 7,
) -> list[KernelTime]:
    """Time kernels on square matrices, backends in turn so that a drift hits all alike.

    Args:
        sizes: Numbers of rows and columns.
        backends: Names; ``"eager"`` is timed in any case.
        rounds: Counted calls, after one that is not.

    Returns:
        One row for each kernel, size and backend; medians.
    """
    rows = []
    for size in sizes:
        for kernel, arguments in _calls(size):
            names = dict.fromkeys(("eager", *backends))
            forms = {name: kernel.on(name) for name in names}
            spent = _in_turn(forms, arguments, rounds)
            rows += [
                KernelTime(kernel.__name__, size, name, 1e6 * t, t / spent["eager"])  # type: ignore[attr-defined]
                for name, t in spent.items()
            ]
    return rows


def _in_turn(
    forms: dict[str, Callable[..., Any]], arguments: tuple[Any, ...], rounds: int
) -> dict[str, float]:
    spent: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(rounds + 1):
        for name, form in forms.items():
            start = time.perf_counter()
            form(*arguments)
            if number:
                spent[name].append(time.perf_counter() - start)
    return {name: statistics.median(own) for name, own in spent.items()}


def _calls(size: int) -> list[tuple[Kernel[..., Any], tuple[Any, ...]]]:
    w, g, m = (0.01 * torch.randn(size, size) for _ in range(3))
    units, features = torch.ones(size), torch.ones(size)
    rate, keep = torch.tensor(1e-6), torch.tensor(1.0)
    return [
        (within, ([g], [GREATEST])),
        (column_square_sum, (g,)),
        (scaled_gemm_, (w, g, m, units, features, rate, keep, None, None, False, True)),
        (apply_updates_, ([w], [g], [None], [units], [features], [1e-6], [1.0])),
        (move_moments, ([units], [features], [0.5], [0.5], 0.9, 1e-8, 1e-12, 0.0, 100.0)),
        (row_normalized_update_, (w, m, g, 0.95, True, rate, keep, 1e-12)),
        (two_sided_fit, (g, 5)),
        (two_sided_scales, ([g], [units], [features], [1.0], 5, 0.1)),
    ]
