"""The work list of one step: which parameters move, in which batches."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neurms.core.optimizers.recipe import Recipe, stack_states
from neurms.core.precision import compute_dtype
from neurms.core.routing import Route
from neurms.core.structures.base import Context

__all__ = ["Item", "batches", "updates_of", "gathered", "nonfinite_names"]

BATCH_LIMIT = 1 << 15
"""Elements below which equal matrices are stacked. Measured on twelve of them, one thread: at 64 x
64 a stack takes .3 to .8 of the time of one by one (RACS, RMNP, Muon, Alice, LAMB, Shampoo), at 128
x 128 .5 to 1.05, at 255 x 255 it is 1.1 to 2.6 times slower, since copies then cost more than
calls."""


@dataclass(frozen=True, eq=False)
class Item:
    """One parameter with a gradient in this step; ``index`` counts parameters over all groups."""

    index: int
    route: Route
    group: dict[str, Any]
    gradient: Tensor

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


def nonfinite_names(items: Sequence[Item]) -> list[str]:
    """Return the names of parameters whose gradient holds a NaN or an infinity.

    A sum reads each gradient once at memory speed and is non-finite whenever an element is; only
    then are elements looked at, since a sum of huge finite numbers may overflow.
    """
    if not items:
        return []
    by_device: dict[torch.device, list[Item]] = {}
    for item in items:
        by_device.setdefault(item.gradient.device, []).append(item)
    suspects = []
    for own in by_device.values():
        sums = torch.stack([item.gradient.sum(dtype=torch.float32) for item in own])
        finite = torch.isfinite(sums).tolist()
        suspects += [item for item, good in zip(own, finite, strict=True) if not good]
    return [s.route.name for s in suspects if not bool(torch.isfinite(s.gradient).all())]


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
        key = (recipe, shape, compute_dtype(item.parameter), item.parameter.device, step, alone)
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
            item.route.layout.matrix(state.get("master", item.parameter).to(gradients[0].dtype))
            for item, state in zip(batch, states, strict=True)
        ]
    seeds = tuple(item.seed for item in batch)
    if len(batch) == 1:
        weight = weights[0] if weights else None
        context = Context(first["step"], weight, seeds)
        return [recipe.update(gradients[0], first, context)]
    tensors = [
        {k: v for k, v in s.items() if isinstance(v, Tensor) and k != "master"} for s in states
    ]
    stacked = stack_states(tensors) if tensors[0] else {}
    context = Context(first["step"], torch.stack(weights) if weights else None, seeds)
    updates = recipe.update(torch.stack(list(gradients)), stacked, context)
    for position, state in enumerate(tensors):
        for key, value in state.items():
            value.copy_(stacked[key][position])
    return updates.unbind(0)
