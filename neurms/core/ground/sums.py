"""Sums over the rows of sharded matrices, sent for all matrices of a step together.

What needs such sums is written as a generator: it yields its part of each and is sent the whole.
So many matrices can be worked on side by side, and a sum that is due in all is one exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from neurms.core.ground.shards import RowShard

__all__ = ["Summing", "by_itself", "together"]

_T = TypeVar("_T")

Summing: TypeAlias = Generator[Tensor, Tensor, _T]
"""Work that yields sums over this rank's rows, is sent those over all rows, and has a result."""


def by_itself(work: Summing[_T], summed: Callable[[Tensor], Tensor]) -> _T:
    """Return the result of work whose sums ``summed`` takes over all rows, one after the other.

    Example:
        >>> def norm(rows: Tensor) -> Summing[Tensor]:
        ...     return (yield rows.square().sum()).sqrt()
        >>> by_itself(norm(torch.tensor([3.0])), lambda own: own + 16.0)
        tensor(5.)
    """
    try:
        part = next(work)
        while True:
            part = work.send(summed(part))
    except StopIteration as end:
        result: _T = end.value
        return result


def together(works: Sequence[tuple[Summing[_T], RowShard]]) -> list[_T]:
    """Return the results of works whose first sums are one exchange, whose second are one, and on.

    There is one for each set of ranks and dtype among them. What the results are does not depend
    on what else is on its way, but for the order in which an all-reduce of several ranks adds up.

    Args:
        works: Work on some matrices, and the rows of theirs that are here; in the same order on
            every rank, with sums of the same shapes.
    """
    results: dict[int, _T] = {}
    wholes: list[Tensor | None] = [None] * len(works)
    waiting = list(range(len(works)))
    while waiting:
        due: list[tuple[int, Tensor]] = []
        for index in waiting:
            work, whole = works[index][0], wholes[index]
            try:
                due.append((index, next(work) if whole is None else work.send(whole)))
            except StopIteration as end:
                results[index] = end.value
        for index, whole in zip((i for i, _ in due), _exchanged(works, due), strict=True):
            wholes[index] = whole
        waiting = [index for index, _ in due]
    return [results[index] for index in range(len(works))]


def _exchanged(
    works: Sequence[tuple[Summing[Any], RowShard]], due: Sequence[tuple[int, Tensor]]
) -> list[Tensor]:
    """Return parts summed over ranks, those of a group and a dtype in one call."""
    alike: dict[Any, list[int]] = {}
    for place, (index, part) in enumerate(due):
        key = works[index][1].groups, part.dtype, part.device
        alike.setdefault(key, []).append(place)
    wholes = [part for _, part in due]
    for places in alike.values():
        shard = works[due[places[0]][0]][1]
        parts = [wholes[place] for place in places]
        flat = shard.sum_(torch.cat([part.flatten() for part in parts]))
        pieces = flat.split([part.numel() for part in parts])
        for place, piece in zip(places, pieces, strict=True):
            wholes[place] = piece.view(wholes[place].shape)
    return wholes
