"""The work list of one step: which parameters move, in which batches."""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from neurms.compiled.finite import within
from neurms.core.ground.layout import Layout
from neurms.core.ground.precision import compute_dtype
from neurms.core.ground.shards import (
    RowShard,
    is_sharded,
    local,
    local_state,
    mesh_of,
    placement_of,
    rewrapped,
    row_shard,
)
from neurms.core.optimizers.recipe import Recipe, stack_states
from neurms.core.routing import Route
from neurms.core.structures.base import Context

__all__ = [
    "Item",
    "batches",
    "updates_of",
    "gathered",
    "is_rehearsal",
    "nonfinite_names",
    "shard_for",
]

BATCH_LIMIT = 1 << 15
"""Elements below which equal matrices are stacked. Measured on twelve of them, one thread: at 64 x
64 a stack takes .3 to .8 of the time of one by one (RACS, RMNP, Muon, Alice, LAMB, Shampoo), at 128
x 128 .5 to 1.05, at 255 x 255 it is 1.1 to 2.6 times slower, since copies then cost more than
calls."""


@dataclass(frozen=True, eq=False)
class Item:
    """One parameter with a gradient in this step; ``index`` counts parameters over all groups.

    ``shard`` says which rows of a sharded matrix its rule works on here; None is the whole of it.
    ``begun`` says that the recipe's row-local beginning has been through the gradient already.
    """

    index: int
    route: Route
    group: dict[str, Any]
    gradient: Tensor
    shard: RowShard | None = None
    begun: bool = False

    @property
    def parameter(self) -> Tensor:
        """The parameter to update."""
        return self.route.parameter

    @property
    def seed(self) -> int:
        """Seed of the parameter's random draws, from its name: no order of groups matters."""
        return zlib.crc32(self.route.name.encode()) + (int(self.group.get("seed", 0)) << 32)

    @property
    def rule(self) -> str:
        """The rule that takes it."""
        return self.route.rule

    @property
    def layout(self) -> Layout:
        """The layout of what :meth:`seen` returns."""
        return self.shard.layout(self.route.layout) if self.shard else self.route.layout

    def seen(self, tensor: Tensor) -> Tensor:
        """Return what the rule sees of the parameter or of a tensor like it.

        That is this rank's rows, or all of it: then every rank must call this, for it gathers.
        """
        if self.shard is not None or not is_sharded(tensor):
            return local(tensor)
        whole: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
        return whole

    def placed(self, recipe: Recipe, state: dict[str, Any]) -> Item:
        """Return the item with a sharded gradient as its recipe wants to see it.

        A recipe that is not row-local as a whole has taken its first steps, on rows, by then: what
        is gathered for :attr:`Recipe.parts`' second half is what the first made of the gradient.
        """
        if not is_sharded(self.parameter):
            return self
        item = replace(self, shard=shard_for(recipe, self.parameter, self.route.layout))
        if recipe.row_local or item.shard is None:
            return replace(item, gradient=item.seen(self.gradient))
        head, _ = recipe.parts
        rows = item.layout.matrix(local(self.gradient).to(compute_dtype(self.parameter)))
        (update,) = updates_of(head, [item], [rows], [state])
        part = rewrapped(item.layout.from_matrix(update), self.parameter)
        return replace(self, gradient=self.seen(part), begun=True)


def gathered(groups: Iterable[dict[str, Any]], routes: Mapping[Tensor, Route]) -> list[Item]:
    """Return an item for each non-empty parameter with a gradient.

    Raises:
        TypeError: A gradient is sparse.
    """
    items, index = [], -1
    for group in groups:
        for parameter in group["params"]:
            index += 1
            gradient = parameter.grad
            if gradient is None or parameter.numel() == 0:
                continue
            if gradient.layout is not torch.strided:
                raise TypeError(
                    f"the gradient of {routes[parameter].name!r} is sparse; build the embedding "
                    "with sparse=False or give it to torch.optim.SparseAdam"
                )
            items.append(Item(index, routes[parameter], group, gradient))
    return items


def nonfinite_names(items: Sequence[Item], greatest: Sequence[float] | None = None) -> list[str]:
    """Return the names of parameters whose gradient holds a NaN or an infinity, or is too large.

    A norm reads each gradient once at memory speed and is no less than any element; only where it
    is above the bound are elements looked at. Ranks that share sharded gradients agree on the
    answer, so that all of them take the step or none.

    Args:
        items: Parameters with their gradients.
        greatest: The largest magnitude that each gradient may have; None for any finite one.
    """
    if not items:
        return []
    names = _on_any_rank(items, set(_bad_here(items, greatest or [math.inf] * len(items))))
    return [item.route.name for item in items if item.route.name in names]


def _on_any_rank(items: Sequence[Item], names: set[str]) -> set[str]:
    """Return ``names`` and what other ranks have named among the items that are sharded."""
    meshes: dict[Any, list[Item]] = {}
    for item in items:
        if is_sharded(item.gradient):
            meshes.setdefault(mesh_of(item.gradient), []).append(item)
    for mesh, own in meshes.items():
        names = names | _agreed(mesh, own, names)
    return names


def shard_for(recipe: Recipe, parameter: Tensor, layout: Layout) -> RowShard | None:
    """Return the rows on which a recipe works before anything is gathered, None for no such work.

    Args:
        recipe: The parameter's recipe.
        parameter: A parameter or a stand-in for it.
        layout: Its units and features.
    """
    if not is_sharded(parameter) or not (recipe.row_local or recipe.parts[0].transforms):
        return None
    return row_shard(parameter, layout)


def is_rehearsal(items: Sequence[Item]) -> bool:
    """Return whether a step has no rate and no gradient, so that only state is wanted of it.

    This is how torch.distributed.checkpoint makes an optimizer allocate what it will load.
    """
    if not items or any(float(item.group["lr"]) for item in items):
        return False
    moving = {item.route.name for item in items if bool(local(item.gradient).any())}
    return not _on_any_rank(items, moving)


def _bad_here(items: Sequence[Item], greatest: Sequence[float]) -> list[str]:
    """Return the names of parameters whose gradient, where this rank holds it, is out of bounds."""
    by_device: dict[torch.device, list[tuple[str, Tensor, float]]] = {}
    for item, bound in zip(items, greatest, strict=True):
        part = local(item.gradient)
        own = (item.route.name, part, min(bound, torch.finfo(_wide(part)).max))
        by_device.setdefault(part.device, []).append(own)
    suspects = []
    for device, parts in by_device.items():
        _, own_parts, bounds = zip(*parts, strict=True)
        if device.type == "cpu" and within(own_parts, bounds):
            continue
        small = torch.stack([_norm(part) <= bound for _, part, bound in parts]).tolist()
        suspects += [own for own, good in zip(parts, small, strict=True) if not good]
    return [
        name
        for name, part, bound in suspects
        if not bool((part.to(_wide(part)).abs() <= bound).all())
    ]


def _norm(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=_wide(tensor))
    return norm


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _agreed(mesh: Any, items: Sequence[Item], names: Collection[str]) -> set[str]:
    """Return which items any rank of a mesh has named, by one all-reduce for each of its axes."""
    flags = torch.tensor([item.route.name in names for item in items], dtype=torch.int32)
    flags = flags.to(items[0].gradient.device)
    for axis in range(mesh.ndim):
        torch.distributed.all_reduce(flags, group=mesh.get_group(axis))
    return {item.route.name for item, bad in zip(items, flags.tolist(), strict=True) if bad}


def batches(
    items: Sequence[Item], recipes: Sequence[Recipe], states: Mapping[Tensor, Any]
) -> Iterator[tuple[Recipe, list[Item]]]:
    """Yield runs of items that one call of their recipe may process together."""
    stacks: dict[Any, list[Item]] = {}
    for item, recipe in zip(items, recipes, strict=True):
        shape = item.route.layout.matrix_shape
        small = recipe.batched and shape[0] * shape[1] < BATCH_LIMIT
        alone: Any = None if small else item.index
        step = states[item.parameter]["step"]
        # By shapes over all ranks, for ranks must form the same batches.
        cut = placement_of(item.parameter)
        device = item.parameter.device
        key = (recipe, shape, compute_dtype(item.parameter), device, step, alone, cut)
        stacks.setdefault(key, []).append(item)
    for key, stack in stacks.items():
        yield key[0], stack


def updates_of(
    recipe: Recipe,
    batch: Sequence[Item],
    gradients: Sequence[Tensor],
    states: Sequence[dict[str, Any]],
) -> Iterable[Tensor]:
    """Run ``recipe`` on a batch and return one update matrix (m, n) for each item."""
    first = states[0]
    weights = None
    if recipe.needs_weight:
        weights = [
            item.layout.matrix(
                item.seen(state.get("master", item.parameter)).to(gradients[0].dtype)
            )
            for item, state in zip(batch, states, strict=True)
        ]
    seeds = tuple(item.seed for item in batch)
    if len(batch) == 1:
        weight = weights[0] if weights else None
        context = Context(first["step"], weight, seeds, shard=batch[0].shard)
        return [recipe.update(gradients[0], _local_if_sharded(batch[0], first), context)]
    tensors = [
        {k: local(v) for k, v in s.items() if isinstance(v, Tensor) and k != "master"}
        for s in states
    ]
    stacked = stack_states(tensors) if tensors[0] else {}
    weight = torch.stack(weights) if weights else None
    context = Context(first["step"], weight, seeds, shard=batch[0].shard)
    updates = recipe.update(torch.stack(list(gradients)), stacked, context)
    for position, state in enumerate(tensors):
        for key, value in state.items():
            value.copy_(stacked[key][position])
    return updates.unbind(0)


def _local_if_sharded(item: Item, state: dict[str, Any]) -> dict[str, Any]:
    return state if item.shard is None else local_state(state)
