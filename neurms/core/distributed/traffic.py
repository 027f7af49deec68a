"""What an optimizer's step sends between ranks, predicted from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neurms.core.distributed.exchange import Exchange
from neurms.core.distributed.owner_traffic import of_owners, verdicts_of_owners
from neurms.core.ground.precision import compute_dtype
from neurms.core.ground.shards import RowShard, mesh_of, placement_of, row_shard
from neurms.core.ground.sums import Summing, together
from neurms.core.optimizers.by_recipe import batches, by_rows
from neurms.core.optimizers.plan import meta_like
from neurms.core.optimizers.recipe import Recipe
from neurms.core.optimizers.view import View, shard_for
from neurms.core.routing import FALLBACK
from neurms.core.structures.base import Context
from neurms.core.unitwise.gradient_rule import partner_of
from neurms.core.unitwise.neurms import NeuRMS

if TYPE_CHECKING:
    from neurms.core.optimizers.base import PreconditionedOptimizer

__all__ = ["Exchange", "step_exchanges"]


def step_exchanges(optimizer: PreconditionedOptimizer) -> list[Exchange]:
    """Return the collective calls of one step with all gradients, in their order.

    Beside these the wrapper of the model (DDP, FSDP2) exchanges what it would with any optimizer.
    NeuRMS's variant B makes its calls by layer during backward; they are listed for one backward
    pass. A weight that tensor parallelism and FSDP2 both cut, and that is gathered, torch gathers
    along one axis of the mesh after the other; it is listed as one call.

    Args:
        optimizer: One of this library's optimizers; its parameters may be on the meta device.

    Returns:
        One entry for each call; empty on one rank without sharded parameters.

    Example:
        >>> import torch, neurms
        >>> from neurms.core.distributed.traffic import step_exchanges
        >>> step_exchanges(neurms.RACS(torch.nn.Linear(4, 4), head="rule"))
        []
    """
    views = [
        replace(view, gradient=meta_like(view.parameter), state={"step": 1})
        for view in optimizer.work()
        if view.parameter.requires_grad and not view.empty
    ]
    optimizer.sharing.assign(optimizer)
    found = [*_statistics(optimizer), *verdicts_of_owners(optimizer), *_verdicts(views)]
    if isinstance(optimizer, NeuRMS) and optimizer.probed:
        found += _moments(optimizer, views)
    # NeuRMS's factors are the same on every rank, and act on the rows that are there.
    ruled = [view for view in views if view.rule not in (FALLBACK, NeuRMS.rule)]
    for view in ruled:
        view.recipe = optimizer.recipe_of(view.group)
    owned = [view for view in ruled if optimizer.sharing.crew_of(view.parameter) is not None]
    own = [view for view in ruled if view.sharded and view not in owned]
    for rule in dict.fromkeys(view.rule for view in (*own, *owned)):
        found += _of_rule([view for view in own if view.rule == rule])
        alike = [view for view in owned if view.rule == rule]
        found += of_owners(optimizer.sharing, alike, _of_beginning)
    return found + list(_lengths(views))


def _of_rule(views: list[View]) -> Iterator[Exchange]:
    """Yield what matrices of a rule send: sums over rows of all together, then gathered ones."""
    rows = [view for view in views if by_rows(view.recipe, view)]
    yield from _sums(list(batches(rows)))
    for recipe, batch in batches([view for view in views if view not in rows]):
        yield from _gathered(recipe, batch)


def _statistics(optimizer: PreconditionedOptimizer) -> Iterator[Exchange]:
    layers = list(optimizer.layers) if isinstance(optimizer, NeuRMS) else []
    if not isinstance(optimizer, NeuRMS) or not layers or optimizer.layers.ranks.size == 1:
        return
    # One after the other, one for each axis of a mesh.
    axes = optimizer.layers.ranks.groups
    # float64 sums by unit and by feature, and two counts of rows.
    sizes = [8 * (sum(layer.sizes) + 2) for layer in layers]
    for layer in reversed(layers):
        if layer.rule.upstream:
            size = 8 * (layer.route.layout.units + 2)
            what = f"scale of {layer.name} in backward"
            yield from (Exchange("all-reduce", size, what) for _ in axes)
    yield from (Exchange("all-reduce", sum(sizes), "statistics of all layers") for _ in axes)


def _moments(optimizer: NeuRMS, views: list[View]) -> Iterator[Exchange]:
    """Yield what variant P sends: q, and the column sums with a bias's, of matrices by rows."""
    sizes: dict[Any, int] = {}
    for view in views:
        if view.rule != NeuRMS.rule or not view.sharded or view.parameter.ndim < 2:
            continue
        recipe = optimizer.recipe_of(view.group)
        bias = partner_of(view.route, optimizer.routes)
        shard = shard_for(recipe, view.parameter, view.route.layout)
        if shard is not None:
            size = 8 * (sum(view.route.layout.matrix_shape) + (bias is not None))
            sizes[shard.groups] = sizes.get(shard.groups, 0) + size
            continue
        gathered = [view] if bias is None else [view, optimizer.view_of(bias.parameter)]
        for own in gathered:
            size = _gathered_numbers(own.parameter) * own.parameter.element_size()
            yield Exchange("all-gather", size, f"gradient of {own.route.name}")
        for own in gathered if view.group["momentum"] else ():
            size = _gathered_numbers(own.parameter) * compute_dtype(own.parameter).itemsize
            yield Exchange("all-gather", size, f"momentum of {own.route.name}")
    for groups, size in sizes.items():
        yield from (Exchange("all-reduce", size, "sums over rows of all matrices") for _ in groups)


def _lengths(views: list[View]) -> Iterator[Exchange]:
    """Yield the sums over rows that ``normalize`` takes: a float64 for each tensor of a group."""
    counts: dict[tuple[int, Any], int] = {}
    for view in views:
        if view.rule == NeuRMS.rule and view.sharded and view.group["normalize"]:
            shard = row_shard(view.parameter, view.route.layout)
            assert shard is not None, "other cuts are refused when layers are attached"
            key = id(view.group), shard.groups
            counts[key] = counts.get(key, 0) + 1
    for count in counts.values():
        yield Exchange("all-reduce", 8 * count, "lengths of the updates of a group")


def _verdicts(views: list[View]) -> Iterator[Exchange]:
    """Yield the agreement on gradients that are NaN or infinite: an int32 for each parameter."""
    meshes: dict[Any, int] = {}
    for view in views:
        if view.sharded:
            mesh = mesh_of(view.parameter)
            meshes[mesh] = meshes.get(mesh, 0) + 1
    for mesh, count in meshes.items():
        for _ in range(mesh.ndim):
            yield Exchange("all-reduce", 4 * count, "whether all gradients are finite")


def _gathered(recipe: Recipe, batch: list[View]) -> Iterator[Exchange]:
    shard = shard_for(recipe, batch[0].parameter, batch[0].route.layout)
    head, rest = recipe.parts if shard is not None else (None, recipe)
    for item in batch:
        if head is not None:
            yield from _sums([(head, [item])])
        dtype = item.parameter.dtype if head is None else compute_dtype(item.parameter)
        size = _gathered_numbers(item.parameter) * dtype.itemsize
        yield Exchange("all-gather", size, f"gradient of {item.route.name}")
    if rest.needs_weight:
        for item in batch:
            size = _gathered_numbers(item.parameter) * item.parameter.element_size()
            yield Exchange("all-gather", size, f"weight of {item.route.name}")


def _of_beginning(head: Recipe, item: View) -> list[Exchange]:
    return _sums([(head, [item])])


def _sums(parts: list[tuple[Recipe, list[View]]]) -> list[Exchange]:
    """Run recipes on tensors without storage, and write down what they sum over ranks."""
    sent: list[int] = []
    together([_work(recipe, batch, sent) for recipe, batch in parts])
    return [Exchange("all-reduce", size, "sums over rows of all matrices") for size in sent]


def _work(recipe: Recipe, batch: list[View], sent: list[int]) -> tuple[Summing[Tensor], RowShard]:
    item, count = batch[0], len(batch)
    shard = row_shard(item.parameter, item.route.layout)
    assert shard is not None, "only what is cut by rows is worked on by rows"
    counting = _Counting(shard.start, shard.rows, shard.total, shard.groups, sent)
    shape = (shard.rows, item.route.layout.matrix_shape[1])
    dtype = compute_dtype(item.parameter)
    matrix = torch.empty(shape if count == 1 else (count, *shape), dtype=dtype, device="meta")
    weight = torch.empty_like(matrix) if recipe.needs_weight else None
    context = Context(1, weight, tuple(i.seed for i in batch), shard=counting)
    return recipe.summing(matrix, recipe.init(matrix), context), counting


@dataclass(frozen=True)
class _Counting(RowShard):
    """Rows whose sums over ranks are only written down."""

    sent: list[int] = field(default_factory=list)

    def sum_(self, tensor: Tensor) -> Tensor:
        self.sent.extend([tensor.numel() * tensor.element_size()] * len(self.groups))
        return tensor


def _gathered_numbers(parameter: Tensor) -> int:
    """Return the entries of all ranks' parts, which are padded to one size for the journey."""
    from torch.distributed.tensor import Shard

    mesh, placements = placement_of(parameter)
    shape = list(parameter.shape)
    for dim, placement in enumerate(placements):
        if isinstance(placement, Shard):
            ranks = mesh.size(dim)
            shape[placement.dim] = -(-shape[placement.dim] // ranks) * ranks
    return math.prod(shape)
