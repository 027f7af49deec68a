"""Matrices on the way to the rank that owns them, and what it made of them on the way back.

All of it is torch's collectives: parts of rows travel in one ``all_to_all`` for a round, and whole
parameters of replicas in one ``broadcast`` for each owner.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from neurms.core.ground.shards import mesh_of, placement_of

__all__ = ["Broadcasts", "Crew", "Cut", "FromOwners", "Parcel", "ToOwners", "cut_of"]


@dataclass(frozen=True)
class Crew:
    """The ranks among which the matrices of a model are divided.

    Args:
        group: Their process group.
        size: How many they are.
        rank: This rank's place among them.
        axes: Its coordinates on the mesh of sharded parameters, for each of the ranks; none for
            replicas.
    """

    group: Any
    size: int
    rank: int
    axes: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of_group(cls, group: Any) -> Crew:
        """Return the ranks of a process group, which hold replicas."""
        distributed = torch.distributed
        return cls(group, distributed.get_world_size(group), distributed.get_rank(group))

    @classmethod
    def of_mesh(cls, mesh: Any) -> Crew:
        """Return the ranks of a mesh, which hold parts of parameters."""
        ranks = sorted(mesh.mesh.flatten().tolist())
        if mesh.ndim == 1:
            group = mesh.get_group(0)
        elif len(ranks) == torch.distributed.get_world_size():
            group = torch.distributed.group.WORLD
        else:
            group = torch.distributed.new_group(ranks, use_local_synchronization=True)
        axes = tuple(tuple((mesh.mesh == rank).nonzero()[0].tolist()) for rank in ranks)
        return replace(cls.of_group(group), axes=axes)


@dataclass(frozen=True)
class Cut:
    """How a parameter is cut into parts.

    Args:
        dim: The dimension of the parameter that is cut.
        axis: The axis of the mesh along which the parts lie; along others there are copies.
        sizes: Length of each part.
    """

    dim: int
    axis: int
    sizes: tuple[int, ...]

    def is_copy(self, crew: Crew, one: int, other: int) -> bool:
        """Return whether two ranks belong to the same copy of the parameter."""
        pairs = enumerate(zip(crew.axes[one], crew.axes[other], strict=True))
        return all(a == b for axis, (a, b) in pairs if axis != self.axis)

    def part(self, crew: Crew, rank: int) -> int:
        """Return which part a rank holds."""
        return crew.axes[rank][self.axis]


def cut_of(parameter: Tensor) -> Cut | None:
    """Return how a ``DTensor`` is cut, None unless it is along one axis and in torch's even way."""
    from torch.distributed.tensor import Replicate, Shard

    _, placements = placement_of(parameter)
    axes = [axis for axis, placement in enumerate(placements) if placement != Replicate()]
    # Shard's subclasses hold parts in another order.
    if len(axes) != 1 or type(placements[axes[0]]) is not Shard:
        return None
    dim, ranks = placements[axes[0]].dim, mesh_of(parameter).size(axes[0])
    total = parameter.shape[dim]
    most = -(-total // ranks)
    sizes = (max(0, min(most, total - place * most)) for place in range(ranks))
    return Cut(dim, axes[0], tuple(sizes))


@dataclass(frozen=True)
class Parcel:
    """One matrix of a round.

    Args:
        owner: The rank of the crew that owns it.
        shape: Shape of the whole.
        cut: Its parts.
    """

    owner: int
    shape: torch.Size
    cut: Cut

    def part_shape(self, part: int) -> list[int]:
        """Return the shape of a part."""
        shape = list(self.shape)
        shape[self.cut.dim] = self.cut.sizes[part]
        return shape

    def numel(self, crew: Crew, rank: int) -> int:
        """Return the entries that a rank holds."""
        return math.prod(self.part_shape(self.cut.part(crew, rank)))


class _Journey:
    """One ``all_to_all`` that is under way.

    Args:
        crew: The ranks.
        pieces: For each rank, what it gets.
        counts: For each rank, the entries that come from it.
        like: A tensor of the dtype and the device of all of these.
    """

    def __init__(
        self, crew: Crew, pieces: Sequence[Sequence[Tensor]], counts: Sequence[int], like: Tensor
    ) -> None:
        flat = [piece.reshape(-1) for own in pieces for piece in own]
        self._sent = torch.cat(flat) if flat else like.new_empty(0)
        self._come = like.new_empty(sum(counts))
        self._counts = list(counts)
        leaving = [sum(piece.numel() for piece in own) for own in pieces]
        self._work = torch.distributed.all_to_all_single(
            self._come, self._sent, self._counts, leaving, group=crew.group, async_op=True
        )

    def arrived(self) -> list[Tensor]:
        """Wait; return what came from each rank."""
        if self._work is not None:
            self._work.wait()
        return list(self._come.split(self._counts))


class ToOwners:
    """The parts of a round's matrices on the way to their owners.

    Args:
        crew: The ranks.
        parcels: The matrices.
        parts: This rank's part of each, of one dtype.
    """

    def __init__(self, crew: Crew, parcels: Sequence[Parcel], parts: Sequence[Tensor]) -> None:
        self._crew, self._parcels = crew, parcels
        me = crew.rank
        pieces = [
            [
                part
                for parcel, part in zip(parcels, parts, strict=True)
                if parcel.owner == rank and parcel.cut.is_copy(crew, me, rank)
            ]
            for rank in range(crew.size)
        ]
        counts = [
            sum(p.numel(crew, rank) for p in parcels if self._comes(p, rank))
            for rank in range(crew.size)
        ]
        self._journey = _Journey(crew, pieces, counts, parts[0])

    def _comes(self, parcel: Parcel, rank: int) -> bool:
        """Whether a part of a matrix comes here from ``rank``."""
        me = self._crew.rank
        return parcel.owner == me and parcel.cut.is_copy(self._crew, me, rank)

    def arrived(self) -> list[Tensor | None]:
        """Wait; return the whole of each matrix that this rank owns, None for others."""
        crew = self._crew
        rests = self._journey.arrived()
        found: list[Tensor | None] = []
        for parcel in self._parcels:
            parts: dict[int, Tensor] = {}
            for rank in range(crew.size):
                if self._comes(parcel, rank):
                    place = parcel.cut.part(crew, rank)
                    count = parcel.numel(crew, rank)
                    parts[place] = rests[rank][:count].view(parcel.part_shape(place))
                    rests[rank] = rests[rank][count:]
            ordered = [parts[place] for place in sorted(parts)]
            found.append(torch.cat(ordered, parcel.cut.dim) if ordered else None)
        return found


class FromOwners:
    """What owners made of a round's matrices on the way to the ranks that hold parts.

    Args:
        crew: The ranks.
        parcels: The matrices.
        wholes: What is sent of each that this rank owns, None for others.
        like: A tensor of the dtype and the device of all of these.
    """

    def __init__(
        self, crew: Crew, parcels: Sequence[Parcel], wholes: Sequence[Tensor | None], like: Tensor
    ) -> None:
        self._crew, self._parcels = crew, parcels
        cut = [
            (parcel.cut, whole.split(parcel.cut.sizes, parcel.cut.dim))
            for parcel, whole in zip(parcels, wholes, strict=True)
            if whole is not None
        ]
        pieces = [[parts[one.part(crew, rank)] for one, parts in cut] for rank in range(crew.size)]
        counts = [
            sum(p.numel(crew, crew.rank) for p in parcels if p.owner == rank)
            for rank in range(crew.size)
        ]
        self._journey = _Journey(crew, pieces, counts, like)

    def arrived(self) -> list[Tensor]:
        """Wait; return this rank's part of each matrix."""
        rests, me = self._journey.arrived(), self._crew.rank
        found = []
        for parcel in self._parcels:
            count = parcel.numel(self._crew, me)
            shape = parcel.part_shape(parcel.cut.part(self._crew, me))
            found.append(rests[parcel.owner][:count].view(shape))
            rests[parcel.owner] = rests[parcel.owner][count:]
        return found


class Broadcasts:
    """A round's parameters on the way from their owners to all replicas.

    Args:
        crew: The ranks.
        owners: The owner of each parameter.
        tensors: The parameters, of one dtype; overwritten where this rank is not the owner.
    """

    def __init__(self, crew: Crew, owners: Sequence[int], tensors: Sequence[Tensor]) -> None:
        self._rank = crew.rank
        self._under_way: list[tuple[int, Any, Tensor, list[Tensor]]] = []
        for owner in sorted(set(owners)):
            own = [t for t, theirs in zip(tensors, owners, strict=True) if theirs == owner]
            flat = _flat(own, filled=owner == crew.rank)
            work = torch.distributed.broadcast(
                flat, group=crew.group, group_src=owner, async_op=True
            )
            self._under_way.append((owner, work, flat, own))

    def arrived(self) -> None:
        """Wait, and write what has come into the parameters."""
        for owner, work, flat, own in self._under_way:
            if work is not None:
                work.wait()
            if owner == self._rank or (len(own) == 1 and flat.data_ptr() == own[0].data_ptr()):
                continue
            for part, tensor in zip(flat.split([t.numel() for t in own]), own, strict=True):
                tensor.copy_(part.view(tensor.shape))


def _flat(tensors: Sequence[Tensor], *, filled: bool) -> Tensor:
    """Return tensors in one piece, or the place for them; one alone is its own place."""
    if len(tensors) == 1 and tensors[0].is_contiguous():
        return tensors[0].view(-1)
    if filled:
        return torch.cat([tensor.reshape(-1) for tensor in tensors])
    return tensors[0].new_empty(sum(tensor.numel() for tensor in tensors))
