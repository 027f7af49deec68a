"""Matrices move where their owners are: one rank computes each, and the others get the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from neurms.compiled.lists import beside
from neurms.core.ground.assignment import rounds
from neurms.core.ground.parcels import Broadcasts, Crew, FromOwners, Parcel, ToOwners, cut_of
from neurms.core.ground.shards import local, mesh_of
from neurms.core.ground.spans import span
from neurms.core.optimizers.by_recipe import (
    BATCH_LIMIT,
    RecipeMover,
    are_many,
    batches,
    rows_state,
    updates_of,
)
from neurms.core.optimizers.recipe import Recipe
from neurms.core.optimizers.sharing import Sharing
from neurms.core.optimizers.view import View, shard_for
from neurms.core.routing import Route

__all__ = ["ROUND_LIMIT", "OwnerMover", "parcels_of", "rounds_by_kind"]

ROUND_LIMIT = 1 << 22
"""Entries that an owner takes in one round, if they are several matrices: 16 MiB of float32 are
enough for a network's full rate, and few enough to begin working early."""


class OwnerMover(RecipeMover):
    """Moves matrices that have an owner by rounds, and all others as its base does.

    While owners work on a round, the gradients of the next one travel, and what was made in the one
    before.

    Args:
        recipe_of: Returns a group's recipe.
        sharing: Knows the owners.
    """

    divided = True

    def __init__(self, recipe_of: Callable[[Mapping[str, Any]], Recipe], sharing: Sharing) -> None:
        super().__init__(recipe_of)
        self._sharing = sharing

    def state_for(self, like: Tensor, route: Route, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return a step count and this rank's share of the state of the group's recipe."""
        if not self._sharing.is_elsewhere(route.parameter):
            return super().state_for(like, route, group)
        return {"step": 0, **rows_state(self._recipe_of(group), like, route.layout)}

    def expected_state(
        self, like: Tensor, route: Route, group: Mapping[str, Any], saved: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the state of a whole matrix, which a checkpoint holds."""
        return super().state_for(like, route, group)

    def judges(self, views: Sequence[View]) -> bool:
        """As the base does, where no matrix has an owner."""
        return not self._sharing.divides and super().judges(views)

    def move(self, views: Sequence[View]) -> None:
        """Move matrices of one crew after the other, and first those that have no owner."""
        if not self._sharing.divides:
            super().move(views)
            return
        crews: dict[Crew, list[View]] = {}
        rest = []
        for view in views:
            crew = self._sharing.crew_of(view.parameter)
            if crew is None:
                rest.append(view)
            else:
                crews.setdefault(crew, []).append(view)
        if rest:
            super().move(rest)
        for crew, own in crews.items():
            _Turn(self, self._sharing, crew, own).take()

    def move_whole(self, views: Sequence[View], among: _Among) -> None:
        """Move matrices that lie here whole, rounded as they are among all others."""
        rest, recipes = [], {id(view.recipe): view.recipe for view in views}
        for key in recipes:
            own = [view for view in views if id(view.recipe) == key]
            with beside(among.entries[key] - sum(map(among.fused, own))):
                rest += self._by_fused(own, among.many)
        self._by_transforms(rest, among.stacked)


class _Among:
    """What one process would do with all matrices at once, in which forms round differently.

    Args:
        views: The matrices of all ranks.
    """

    def __init__(self, views: Sequence[View]) -> None:
        self.many = are_many(views)
        self.stacked = {
            view.index for _, alike in batches(views) if len(alike) > 1 for view in alike
        }
        self.entries: dict[int, int] = {}
        for view in views:
            key = id(view.recipe)
            self.entries[key] = self.entries.get(key, 0) + self.fused(view)

    def fused(self, view: View) -> int:
        """Return the entries of a matrix that go into a fused form, if its recipe has one."""
        size = view.parameter.numel()
        return size if self.many or size >= BATCH_LIMIT else 0


class _Turn:
    """One step of the matrices that a crew divides.

    Args:
        mover: Moves what this rank owns.
        sharing: Knows the owners.
        crew: The ranks.
        views: The matrices, the same on all of them.
    """

    def __init__(
        self, mover: OwnerMover, sharing: Sharing, crew: Crew, views: Sequence[View]
    ) -> None:
        self._mover, self._sharing, self._crew, self._views = mover, sharing, crew, views
        self._among = _Among(views)
        self._failed: torch.linalg.LinAlgError | None = None  # type: ignore[name-defined]

    def take(self) -> None:
        """Take the step.

        Raises:
            LinAlgError: A factorization failed, on whichever rank.
        """
        if self._crew.axes:
            for part in rounds_by_kind(self._sharing, self._views):
                self._sharded(part)
        else:
            self._replicas()
        failed = torch.tensor(float(self._failed is not None), device=self._views[0].device)
        torch.distributed.all_reduce(failed, group=self._crew.group)
        if self._failed is not None:
            raise self._failed
        if failed:
            raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
                "a factorization failed on another rank; see what that one says"
            )

    def _is_mine(self, view: View) -> bool:
        return self._sharing.owner_of(view.parameter) == self._crew.rank

    # ---------------------------------------------------------------- replicas

    def _replicas(self) -> None:
        leaving = []
        for kind in rounds_by_kind(self._sharing, self._views):
            for views in kind:
                for view in views:
                    view.state["step"] += not self._is_mine(view)
                try:
                    mine = [view for view in views if self._is_mine(view)]
                    self._mover.move_whole(mine, self._among)
                except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
                    self._failed = error
                owners = [self._sharing.owner_of(view.parameter) for view in views]
                weights = [view.parameter.detach() for view in views]
                leaving.append(Broadcasts(self._crew, owners, weights))
        for weights_of_round in leaving:
            weights_of_round.arrived()

    # ---------------------------------------------------------------- parts

    def _sharded(self, parts: Sequence[Sequence[View]]) -> None:
        coming = self._sent(parts[0])
        leaving: list[tuple[Sequence[View], FromOwners]] = []
        for number, views in enumerate(parts):
            (gradients, weights), begun = coming
            if number + 1 < len(parts):
                coming = self._sent(parts[number + 1])
            whole = gradients.arrived()
            read = weights.arrived() if weights is not None else None
            steps = self._made(views, whole, read, begun)
            parcels = parcels_of(self._sharing, views)
            like = views[0].parameter.new_empty(0, dtype=views[0].dtype)
            leaving.append((views, FromOwners(self._crew, parcels, steps, local(like))))
            if number:
                self._apply(*leaving.pop(0))
        for last in leaving:
            self._apply(*last)

    def _sent(self, views: Sequence[View]) -> tuple[tuple[ToOwners, ToOwners | None], bool]:
        """Send this rank's part of each gradient, and of each weight that is read."""
        parcels, parts, begun = parcels_of(self._sharing, views), [], False
        for view in views:
            view.state["step"] += 1
            with span("reduce", [view.parameter]):
                part, begun = view.part(view.recipe)
            parts.append(part)
        weights = None
        gradients = ToOwners(self._crew, parcels, parts)
        if _reads_weight(views[0], begun):
            own = [local(view.state.get("master", view.parameter)) for view in views]
            weights = ToOwners(self._crew, parcels, own)
        return (gradients, weights), begun

    def _made(
        self,
        views: Sequence[View],
        gradients: Sequence[Tensor | None],
        weights: Sequence[Tensor | None] | None,
        begun: bool,
    ) -> list[Tensor | None]:
        """Return the step of each matrix that this rank owns, None for others."""
        steps: list[Tensor | None] = [None] * len(views)
        place = {view.index: i for i, view in enumerate(views)}
        for whole, alike in batches([view for view in views if self._is_mine(view)]):
            recipe = whole.parts[1] if begun else whole
            with span("scale", [view.parameter for view in alike]):
                matrices = [_matrix(view, gradients[place[view.index]]) for view in alike]
                read = None
                if weights is not None:
                    read = [_matrix(view, weights[place[view.index]]) for view in alike]
                stack = len(alike) > 1 or alike[0].index in self._among.stacked
                try:
                    work = updates_of(recipe, alike, matrices, read, stack=stack)
                    updates = list(alike[0].context().finished(work))
                except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
                    self._failed, updates = error, [torch.zeros_like(m) for m in matrices]
            for view, update in zip(alike, updates, strict=True):
                steps[place[view.index]] = view.route.layout.from_matrix(update)
        return steps

    def _apply(self, views: Sequence[View], leaving: FromOwners) -> None:
        for view, part in zip(views, leaving.arrived(), strict=True):
            with span("update", [view.parameter]):
                view.advance(view.recipe, part)


def parcels_of(sharing: Sharing, views: Sequence[View]) -> list[Parcel]:
    """Return what the matrices of a round are to those who send them."""
    found = []
    for view in views:
        cut = cut_of(view.parameter)
        assert cut is not None, "a matrix that is cut in another way has no owner"
        found.append(Parcel(sharing.owner_of(view.parameter), view.parameter.shape, cut))
    return found


def _reads_weight(view: View, begun: bool) -> bool:
    recipe = view.recipe.parts[1] if begun else view.recipe
    return bool(recipe.needs_weight)


def _matrix(view: View, whole: Tensor | None) -> Tensor:
    assert whole is not None, "the owner of a matrix has been sent all of it"
    return view.matrix(whole)


def rounds_by_kind(sharing: Sharing, views: Sequence[View]) -> Iterator[list[list[View]]]:
    """Yield the rounds of matrices of one kind after the other: those that travel together."""
    kinds: dict[Any, list[View]] = {}
    for view in views:
        kinds.setdefault(_kind(view), []).append(view)
    for own in kinds.values():
        owners = [sharing.owner_of(view.parameter) for view in own]
        sizes = [view.parameter.numel() for view in own]
        yield [[own[i] for i in each] for each in rounds(owners, sizes, ROUND_LIMIT)]


def _kind(view: View) -> Any:
    """Return what decides dtypes, devices and which calls there are."""
    if not view.sharded:
        return view.kept, view.device
    begun = shard_for(view.recipe, view.parameter, view.route.layout) is not None
    reads = _reads_weight(view, begun)
    return mesh_of(view.parameter), view.kept, view.gradient.dtype, view.device, begun, reads
