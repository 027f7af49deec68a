"""Parameters of which each rank holds a part: torch's ``DTensor``, as FSDP2 makes them.

Most meshes cut a weight along its units, ``Shard(0)``: a rank then holds whole rows. A rule that
works row by row needs no more than those; one that sums over rows gets the sum from all ranks
through :meth:`RowShard.sum_`; any other rule is shown the whole matrix, gathered for the purpose.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from neurms.core.ground.layout import Layout

__all__ = [
    "RowShard",
    "is_sharded",
    "local",
    "local_state",
    "mesh_of",
    "own_part",
    "placed_like",
    "placement_of",
    "rewrapped",
    "row_shard",
    "wrapped_rows",
]


def is_sharded(tensor: object) -> bool:
    """Return whether a tensor is a ``DTensor``, without loading what defines it."""
    # Looked up, not imported: slow to load, and no such tensor exists before it is.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds, sharing its storage; all of a plain one."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def mesh_of(tensor: Tensor) -> Any:
    """Return the device mesh of a ``DTensor``."""
    return tensor.device_mesh  # type: ignore[attr-defined]


def placement_of(tensor: Tensor) -> Any:
    """Return a hashable mark of where a tensor's parts are, None for a plain one."""
    if not is_sharded(tensor):
        return None
    return mesh_of(tensor), tensor.placements  # type: ignore[attr-defined]


def local_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state whose tensors are this rank's parts, sharing their storage."""
    return {k: local(v) if isinstance(v, Tensor) else v for k, v in state.items()}


@dataclass(frozen=True)
class RowShard:
    """The rows of an (m, n) matrix that this rank holds.

    Args:
        start: Index of the first of them.
        rows: How many; 0 on ranks that a small matrix does not reach.
        total: m.
        groups: Process groups of the ranks that hold the other rows, one for each axis of the mesh
            that cuts; summed over one after the other.
    """

    start: int
    rows: int
    total: int
    groups: tuple[Any, ...] = ()

    @property
    def slice(self) -> slice:
        """The rows as a slice of all m."""
        return slice(self.start, self.start + self.rows)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the ranks that hold the matrix, in place, and return it."""
        for group in self.groups:
            torch.distributed.all_reduce(tensor, group=group)
        return tensor

    def layout(self, layout: Layout) -> Layout:
        """Return a layout in which this rank's part is a matrix with the same columns."""
        shape = list(layout.shape)
        shape[layout.unit_axes[0] if layout.unit_axes else 0] = self.rows
        # Groups may be cut anywhere; as a matrix of units, the part does not know of them.
        return replace(layout, shape=tuple(shape), groups=1)

    def narrowed(
        self, layout: Layout, s: Tensor | None, c: Tensor | None
    ) -> tuple[Layout, Tensor | None, Tensor | None]:
        """Return the layout of this rank's part and the factors (m,), (n,) that act on it."""
        mine = None if s is None else s[self.slice]
        if c is None or layout.groups == 1:
            return self.layout(layout), mine, c
        # Wherever the cut falls, each row is a group of its own with its own features.
        own = torch.arange(self.start, self.start + self.rows, device=c.device)
        spread = c.reshape(layout.groups, -1)[own // (self.total // layout.groups)]
        return replace(self.layout(layout), groups=self.rows), mine, spread.flatten()


def row_shard(parameter: Tensor, layout: Layout) -> RowShard | None:
    """Return which rows of ``parameter`` this rank holds, None if it is cut in another way.

    Args:
        parameter: A ``DTensor``.
        layout: Its units and features; a vector is a column of units.
    """
    from torch.distributed.tensor import Replicate, Shard

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    cuts = [dim for dim, placement in enumerate(placements) if placement != Replicate()]
    unit_axes = layout.unit_axes if parameter.ndim >= 2 else (0,)
    if not cuts or len(unit_axes) != 1 or layout.grouped != "units":
        return None
    # Shard's subclasses hold rows in another order.
    inner, axis = cuts[-1], unit_axes[0]
    if type(placements[inner]) is not Shard or placements[inner].dim != axis:
        return None
    total, ranks, place = parameter.shape[axis], mesh.size(inner), mesh.get_local_rank(inner)
    if len(cuts) == 2:
        # Rows cut by tensor parallelism, and each part once more by FSDP2, on an axis before it.
        outer = cuts[0]
        ranks *= mesh.size(outer)
        if not _cuts_again(placements[outer], axis, mesh.size(inner)) or total % ranks:
            return None
        place = place * mesh.size(outer) + mesh.get_local_rank(outer)
    elif len(cuts) > 2:
        return None
    most = -(-total // ranks)
    start = min(total, place * most)
    groups = tuple(mesh.get_group(cut) for cut in cuts)
    return RowShard(start, min(most, total - start), total, groups)


def _cuts_again(placement: Any, axis: int, parts: int) -> bool:
    """Return whether a placement cuts each of so many parts of an axis."""
    from torch.distributed.tensor.placement_types import _StridedShard

    return (
        isinstance(placement, _StridedShard)
        and placement.dim == axis
        and placement.split_factor == parts
    )


def wrapped_rows(
    state: Mapping[str, Tensor], row_axes: Mapping[str, int | None], parameter: Tensor, total: int
) -> dict[str, Tensor]:
    """Return state whose tensors by rows are DTensors placed as ``parameter`` is.

    Checkpoints of several ranks know by that which rank holds what; the rest is the same everywhere
    and stays plain.

    Args:
        state: This rank's state.
        row_axes: The axis of each tensor that counts rows, or None.
        parameter: The ``DTensor`` that the state belongs to.
        total: Rows on all ranks.
    """
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    wrapped = dict(state)
    for key, axis in row_axes.items():
        if axis is None:
            continue
        own = [
            Shard(axis)
            if isinstance(place, Shard)
            else _StridedShard(axis, split_factor=place.split_factor)
            if isinstance(place, _StridedShard)
            else place
            for place in placements
        ]
        shape = list(state[key].shape)
        shape[axis] = total
        whole = torch.empty(shape, device="meta")
        wrapped[key] = DTensor.from_local(
            state[key], mesh, own, run_check=False, shape=whole.shape, stride=whole.stride()
        )
    return wrapped


def rewrapped(part: Tensor, parameter: Tensor) -> Tensor:
    """Return this rank's part of something shaped and placed as a sharded ``parameter`` is."""
    from torch.distributed.tensor import DTensor

    mesh, placements = placement_of(parameter)
    whole = torch.empty(parameter.shape, device="meta")
    wrapped: Tensor = DTensor.from_local(
        part.contiguous(),
        mesh,
        placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )
    return wrapped


def own_part(whole: Tensor, parameter: Tensor) -> Tensor:
    """Return the part of a tensor, equal on all ranks, that ``parameter`` has on this one."""
    if not is_sharded(parameter):
        return whole
    return local(_placed(whole, parameter))


def placed_like(value: Tensor, like: Any) -> Tensor:
    """Return a whole or a sharded ``value`` sharded as ``like`` is; whole if that is plain."""
    if is_sharded(value) == is_sharded(like) or not isinstance(like, Tensor):
        return value
    if is_sharded(like):
        return _placed(value, like)
    whole: Tensor = value.full_tensor()  # type: ignore[attr-defined]
    return whole


def _placed(whole: Tensor, like: Any) -> Tensor:
    from torch.distributed.tensor import DTensor, Replicate

    everywhere = [Replicate()] * like.device_mesh.ndim
    replicated = DTensor.from_local(whole, like.device_mesh, everywhere, run_check=False)
    # From replicas each rank only cuts out its own; nothing is sent.
    placed: Tensor = replicated.redistribute(placements=like.placements)
    return placed
