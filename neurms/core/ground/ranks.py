"""The ranks that train one model together: over them statistics of its layers are summed."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from neurms.core.ground.shards import is_sharded, mesh_of

__all__ = ["ALONE", "Ranks", "ranks_of", "world_size"]


@dataclass(frozen=True)
class Ranks:
    """The ranks that hold one model, or parts of it, and give it different batches.

    Args:
        groups: Process groups, summed over one after the other: one for each axis of a mesh.
        size: Number of ranks.
    """

    groups: tuple[Any, ...] = ()
    size: int = 1

    @classmethod
    def of_group(cls, group: Any) -> Ranks:
        """Return the ranks of one process group."""
        return cls((group,), torch.distributed.get_world_size(group))

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the ranks, in place, and return it."""
        for group in self.groups:
            torch.distributed.all_reduce(tensor, group=group)
        return tensor


ALONE = Ranks()


def world_size() -> int:
    """Return the number of ranks in this world, 1 without torch.distributed."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size()


def ranks_of(parameters: Iterable[Tensor]) -> Ranks | None:
    """Return the ranks that share a model, told by what wraps its parameters; None if nothing does.

    FSDP2 shows its mesh on each parameter. Of DistributedDataParallel a parameter shows nothing, so
    that the wrapper is looked for among all objects that are alive: ask once.

    Args:
        parameters: Parameters of the model.
    """
    own = list(parameters)
    for parameter in own:
        if is_sharded(parameter):
            mesh = mesh_of(parameter)
            return Ranks(tuple(mesh.get_group(axis) for axis in range(mesh.ndim)), mesh.size())
    held = {id(parameter) for parameter in own}
    for found in gc.get_objects():
        # Not isinstance: proxies among these objects answer for something else.
        if issubclass(type(found), DistributedDataParallel) and any(
            id(parameter) in held for parameter in found.module.parameters()
        ):
            return Ranks.of_group(found.process_group)
    return None
