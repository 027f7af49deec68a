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
        group: Process group of the ranks that hold the other rows.
    """

    start: int
    rows: int
    total: int
    group: Any

    @property
    def slice(self) -> slice:
        """The rows as a slice of all m."""
        return slice(self.start, self.start + self.rows)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the ranks that hold the matrix, in place, and return it."""
        torch.distributed.all_reduce(tensor, group=self.group)
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
    if len(cuts) != 1 or len(unit_axes) != 1 or layout.grouped != "units":
        return None
    # Shard's subclasses hold rows in another order.
    if type(placements[cuts[0]]) is not Shard or placements[cuts[0]].dim != unit_axes[0]:
        return None
    total, ranks = parameter.shape[unit_axes[0]], mesh.size(cuts[0])
    most = -(-total // ranks)
    start = min(total, mesh.get_local_rank(cuts[0]) * most)
    return RowShard(start, min(most, total - start), total, mesh.get_group(cuts[0]))


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

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    wrapped = dict(state)
    for key, axis in row_axes.items():
        if axis is None:
            continue
        own = [Shard(axis) if isinstance(place, Shard) else place for place in placements]
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
