"""The length of an update, which ``normalize="rms"`` divides it by: one number a tensor.

With U_t what moves a tensor but for its rate, r_t = RMS(U_t) and d = .9

    l_t = (d (1 - d^(t-1)) l_(t-1) + (1 - d) r_t) / (1 - d^t),   W <- W - lr U_t / l_t

which is the bias-corrected average of r. It holds this step's r, so that no step is longer than lr
(1 - d^t) / (1 - d) < 10 lr in RMS, whatever came before it. Divided by the average of the steps
before, which the pass that moves W would give for nothing, a gradient that comes back after a while
of almost none would move W without bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neurms.core.ground.precision import compute_dtype
from neurms.core.ground.shards import RowShard

__all__ = ["DECAY", "Length", "gains_", "length_like", "over_ranks"]

DECAY = 0.9
"""Decay of the average of an update's RMS."""


class Length(NamedTuple):
    """The length of one tensor's updates.

    Args:
        average: l, shape (), 0 before the first step; overwritten.
        step: t, counted from 1.
        entries: Number of entries, on all ranks.
        shard: The rows that this rank holds, None for all.
    """

    average: Tensor
    step: int
    entries: int
    shard: RowShard | None = None


def length_like(parameter: Tensor) -> Tensor:
    """Return the length before the first step of a parameter, 0."""
    return torch.zeros((), dtype=compute_dtype(parameter), device=parameter.device)


def gains_(lengths: Sequence[Length], sums: Tensor) -> Tensor:
    """Advance lengths by this step's updates; return what those are multiplied by.

    A length of 0, when nothing has ever moved, begins anew with r_t. Where nothing moves either the
    factor is 1: there is no division by 0.

    Args:
        lengths: The averages are overwritten.
        sums: Sums of squares of the updates over all ranks, shape (count,), float64.

    Returns:
        1 / l_t, shape (count,), float64.
    """
    entries = sums.new_tensor([max(length.entries, 1) for length in lengths])
    fresh = sums.new_tensor([(1.0 - DECAY) / (1.0 - DECAY**length.step) for length in lengths])
    averages = [length.average for length in lengths]
    last = torch.stack([average.to(sums) for average in averages])
    now = (sums / entries).sqrt()
    now = torch.where(last > 0, last + fresh * (now - last), now)
    for average, value in zip(averages, now.unbind(), strict=True):
        average.copy_(value)
    return torch.where(now > 0, 1.0 / now, 1.0)


def over_ranks(sums: Tensor, lengths: Sequence[Length]) -> Tensor:
    """Return sums over the ranks that hold rows of a tensor."""
    held: dict[Any, list[int]] = {}
    for index, length in enumerate(lengths):
        if length.shard is not None:
            held.setdefault(length.shard.groups, []).append(index)
    for indices in held.values():
        shard = lengths[indices[0]].shard
        assert shard is not None
        sums[indices] = shard.sum_(sums[indices])
    return sums
