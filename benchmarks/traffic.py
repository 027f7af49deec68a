"""Counts the collective calls of a piece of code, and their bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["CountedTraffic"]

_KINDS = {
    "allreduce_": "all-reduce",
    "all_reduce": "all-reduce",
    "allreduce_coalesced_": "all-reduce",
    "allgather_": "all-gather",
    "_allgather_base_": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "all_gather_into_tensor_out": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
    "broadcast_": "broadcast",
    "alltoall_base_": "all-to-all",
}


class CountedTraffic(TorchDispatchMode):
    """Notes every collective call that is made while it is entered.

    ``calls`` holds (kind, bytes): of the buffer that is reduced or broadcast, of the whole that is
    gathered, and of what this rank gives to an all-to-all.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation and write down a collective one."""
        result = func(*args, **(kwargs or {}))
        namespace, name = func._schema.name.split("::")
        if namespace in ("c10d", "_c10d_functional") and name in _KINDS:
            kind = _KINDS[name]
            counted = (
                result if namespace == "_c10d_functional" and kind == "all-gather" else args[0]
            )
            # The second is what leaves, the first what comes.
            counted = args[1] if kind == "all-to-all" else counted
            self.calls.append((kind, sum(t.nbytes for t in _tensors(counted))))
        return result

    @property
    def bytes(self) -> int:
        """All bytes."""
        return sum(size for _, size in self.calls)


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
