"""Work that yields its sums, alone and side by side."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from neurms.core.ground.shards import RowShard
from neurms.core.ground.sums import Summing, by_itself, together


@dataclass(frozen=True)
class Others(RowShard):
    """Rows to whose every sum the other ranks add 10."""

    seen: list[tuple[str, torch.dtype, int]] = field(default_factory=list)

    def sum_(self, tensor: Tensor) -> Tensor:
        self.seen.append((self.groups[0], tensor.dtype, tensor.numel()))
        return tensor.add_(10.0)


def shard(seen: list[tuple[str, torch.dtype, int]], group: str = "all") -> Others:
    return Others(0, 1, 1, (group,), seen)


def rounds(start: Tensor, count: int) -> Summing[Tensor]:
    """Double and sum, ``count`` times."""
    for _ in range(count):
        start = yield start * 2.0
    return start


def alone(start: Tensor, count: int) -> Tensor:
    return by_itself(rounds(start, count), lambda own: own + 10.0)


def test_alone() -> None:
    assert torch.equal(alone(torch.tensor([1.0]), 0), torch.tensor([1.0]))
    assert torch.equal(alone(torch.tensor([1.0]), 2), torch.tensor([34.0]))


def test_side_by_side_is_as_alone_in_fewer_exchanges() -> None:
    seen: list[tuple[str, torch.dtype, int]] = []
    starts = [torch.ones(2, 3), torch.tensor(5.0), torch.ones(4), torch.ones(2)]
    counts = [2, 3, 0, 1]
    works = [(rounds(s, c), shard(seen)) for s, c in zip(starts, counts, strict=True)]
    found = together(works)
    for result, start, count in zip(found, starts, counts, strict=True):
        assert torch.equal(result, alone(start, count))
    assert seen == [("all", torch.float32, size) for size in (6 + 1 + 2, 6 + 1, 1)]


def test_groups_and_dtypes_have_exchanges_of_their_own() -> None:
    seen: list[tuple[str, torch.dtype, int]] = []
    wide = torch.float64
    works = [
        (rounds(torch.ones(2), 1), shard(seen)),
        (rounds(torch.ones(3, dtype=wide), 1), shard(seen)),
        (rounds(torch.ones(4), 1), shard(seen, "half")),
        (rounds(torch.ones(5), 1), shard(seen)),
    ]
    found = together(works)
    assert [result.dtype for result in found] == [torch.float32, wide, *[torch.float32] * 2]
    assert seen == [("all", torch.float32, 7), ("all", wide, 3), ("half", torch.float32, 4)]


def test_what_goes_wrong_is_raised() -> None:
    def broken() -> Summing[Tensor]:
        yield torch.ones(1)
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        together([(broken(), shard([]))])
    assert together([]) == []
