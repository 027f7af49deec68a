"""Which rank owns which matrix: a plan that every rank makes for itself and finds the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Load", "assigned", "rounds"]


@dataclass(frozen=True)
class Load:
    """What a matrix costs the rank that owns it.

    Args:
        work: Predicted work of a step, in any unit.
        size: Bytes of its state.
    """

    work: float
    size: float

    @classmethod
    def of(cls, rows: int, columns: int, size: float) -> Load:
        """Return the load of a matrix, whose products and factors cost m n min(m, n)."""
        return cls(float(rows) * columns * min(rows, columns), size)


def assigned(loads: Sequence[Load], ranks: int, held: Sequence[Load] | None = None) -> list[int]:
    """Return the owner of each matrix, such that neither work nor state piles up on a rank.

    The heaviest goes first, each to the rank whose larger share, of all work or of all state, stays
    smallest (longest processing time first). Equal input gives equal owners: nothing is drawn.

    Args:
        loads: One for each matrix.
        ranks: Number of ranks.
        held: What each rank owns already; None is nothing.
    """
    before = list(held or [Load(0.0, 0.0)] * ranks)
    every = [*before, *loads]
    work, size = (max(1.0, total) for total in (_sum(every, "work"), _sum(every, "size")))
    sums = [(load.work / work, load.size / size) for load in before]
    shares = [(load.work / work, load.size / size) for load in loads]
    owners = [0] * len(loads)
    for index in sorted(range(len(loads)), key=lambda i: (-max(shares[i]), i)):
        mine = shares[index]
        after = [(own[0] + mine[0], own[1] + mine[1]) for own in sums]
        owner = min(range(ranks), key=lambda rank: (max(after[rank]), sum(after[rank]), rank))
        owners[index], sums[owner] = owner, after[owner]
    return owners


def _sum(loads: Sequence[Load], name: str) -> float:
    return float(sum(getattr(load, name) for load in loads))


def rounds(owners: Sequence[int], sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Return the matrices in rounds, in each of which every owner has about as much to do.

    What is sent for a round goes together. An owner's largest matrices come first; a round takes
    one of them, or smaller ones up to ``limit``.

    Args:
        owners: Owner of each matrix.
        sizes: Entries of each.
        limit: Entries of one owner in a round, if they are several matrices.
    """
    queues: dict[int, list[int]] = {owner: [] for owner in sorted(set(owners))}
    for index in sorted(range(len(owners)), key=lambda i: (-sizes[i], i)):
        queues[owners[index]].append(index)
    found = []
    while any(queues.values()):
        taken: list[int] = []
        for queue in queues.values():
            room = limit
            while queue and (room >= sizes[queue[0]] or room == limit):
                room -= sizes[queue[0]]
                taken.append(queue.pop(0))
        found.append(taken)
    return found
