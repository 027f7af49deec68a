"""What a step sends where matrices have owners, predicted from shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from neurms.core.distributed.exchange import Exchange
from neurms.core.ground.parcels import Crew
from neurms.core.ground.precision import compute_dtype
from neurms.core.optimizers.by_owner import parcels_of, rounds_by_kind
from neurms.core.optimizers.recipe import Recipe
from neurms.core.optimizers.sharing import Sharing
from neurms.core.optimizers.view import View, shard_for

if TYPE_CHECKING:
    from neurms.core.optimizers.base import PreconditionedOptimizer

__all__ = ["of_owners", "verdicts_of_owners"]

Sums = Callable[[Recipe, View], Sequence[Exchange]]


def verdicts_of_owners(optimizer: PreconditionedOptimizer) -> Iterator[Exchange]:
    """Yield what owners tell replicas before a step: an int32 for each matrix."""
    crews: dict[Crew, int] = {}
    for view in optimizer.work():
        crew = optimizer.sharing.crew_of(view.parameter)
        if crew is not None and not crew.axes:
            crews[crew] = crews.get(crew, 0) + 1
    for count in crews.values():
        yield Exchange("all-reduce", 4 * count, "which gradients are there, and finite")


def of_owners(sharing: Sharing, views: Sequence[View], sums: Sums) -> Iterator[Exchange]:
    """Yield the calls of the matrices of one rule that have owners.

    Args:
        sharing: Knows the owners.
        views: The matrices, with their recipes.
        sums: Returns what a row-local beginning sums over ranks for a matrix.
    """
    crews: dict[Crew, list[View]] = {}
    for view in views:
        crew = sharing.crew_of(view.parameter)
        if crew is not None:
            crews.setdefault(crew, []).append(view)
    for crew, own in crews.items():
        for rounds in rounds_by_kind(sharing, own):
            if crew.axes:
                yield from _of_parts(sharing, crew, rounds, sums)
            else:
                yield from _of_replicas(sharing, rounds)
        yield Exchange("all-reduce", 4, "whether all owners have come through")


def _of_replicas(sharing: Sharing, rounds: Sequence[Sequence[View]]) -> Iterator[Exchange]:
    for views in rounds:
        for owner in sorted({sharing.owner_of(view.parameter) for view in views}):
            own = [view for view in views if sharing.owner_of(view.parameter) == owner]
            size = sum(view.parameter.numel() * view.kept.itemsize for view in own)
            yield Exchange("broadcast", size, f"weights of {_names(own)}")


def _of_parts(
    sharing: Sharing, crew: Crew, rounds: Sequence[Sequence[View]], sums: Sums
) -> Iterator[Exchange]:
    yield from _to_owners(sharing, crew, rounds[0], sums)
    for number, views in enumerate(rounds):
        if number + 1 < len(rounds):
            yield from _to_owners(sharing, crew, rounds[number + 1], sums)
        mine = [p for p in parcels_of(sharing, views) if p.owner == crew.rank]
        given = sum(p.numel(crew, rank) for p in mine for rank in range(crew.size))
        yield Exchange("all-to-all", given * views[0].dtype.itemsize, f"steps of {_names(views)}")


def _to_owners(
    sharing: Sharing, crew: Crew, views: Sequence[View], sums: Sums
) -> Iterator[Exchange]:
    begun = False
    for view in views:
        begun = shard_for(view.recipe, view.parameter, view.route.layout) is not None
        if begun:
            yield from sums(view.recipe.parts[0], view)
    given = sum(
        parcel.numel(crew, crew.rank)
        for parcel in parcels_of(sharing, views)
        if parcel.cut.is_copy(crew, crew.rank, parcel.owner)
    )
    first = views[0]
    dtype = first.dtype if begun else first.kept
    yield Exchange("all-to-all", given * dtype.itemsize, f"gradients of {_names(views)}")
    rest = first.recipe.parts[1] if begun else first.recipe
    if rest.needs_weight:
        size = given * _weight(first).itemsize
        yield Exchange("all-to-all", size, f"weights of {_names(views)}")


def _weight(view: View) -> torch.dtype:
    """Return the dtype of the weight that a rule reads."""
    return compute_dtype(view.parameter) if view.low_precision == "master" else view.kept


def _names(views: Sequence[View]) -> str:
    return ", ".join(view.route.name for view in views)
