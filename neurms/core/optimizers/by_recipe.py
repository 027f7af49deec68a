"""Matrices move by their recipe: its fused form where that serves, else its transforms."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from neurms.compiled.native import LEAST_ELEMENTS
from neurms.core.ground.layout import Layout
from neurms.core.ground.precision import compute_dtype
from neurms.core.ground.shards import local, placement_of, wrapped_rows
from neurms.core.ground.spans import is_observed, span
from neurms.core.ground.sums import Summing, together
from neurms.core.optimizers.mover import Mover
from neurms.core.optimizers.recipe import FusedStep, Recipe, stack_states
from neurms.core.optimizers.view import View, shard_for
from neurms.core.routing import Route
from neurms.core.structures.base import Context, State

__all__ = [
    "BATCH_LIMIT",
    "RecipeMover",
    "are_many",
    "batches",
    "by_rows",
    "rows_state",
    "updates_of",
]

BATCH_LIMIT = 1 << 15
"""Elements below which equal matrices are stacked. Measured on twelve of them, one thread: at 64 x
64 a stack takes .3 to .8 of the time of one by one (RACS, RMNP, Muon, Alice, LAMB, Shampoo), at 128
x 128 .5 to 1.05, at 255 x 255 it is 1.1 to 2.6 times slower, since copies then cost more than
calls. Where a recipe has a fused form and matrices are many, small ones take that instead."""


class RecipeMover(Mover):
    """Moves matrices by the recipes that their groups make.

    Args:
        recipe_of: Returns a group's recipe.
    """

    def __init__(self, recipe_of: Callable[[Mapping[str, Any]], Recipe]) -> None:
        self._recipe_of = recipe_of

    def prepare(self, views: Sequence[View]) -> None:
        """Find each view's recipe, and how large its gradient may be."""
        group = recipe = None
        for view in views:
            # Views of a group stand together.
            if view.group is not group:
                group = view.group
                recipe = self._recipe_of(group)
            if view.recipe is not recipe:
                assert recipe is not None
                view.recipe, view.bound = recipe, recipe.greatest(view.parameter)

    def state_for(self, like: Tensor, route: Route, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return a step count and the state of the group's recipe."""
        return {"step": 0, **_matrix_state(self._recipe_of(group), like, route.layout)}

    def judges(self, views: Sequence[View]) -> bool:
        """Return whether all views are of one recipe that judges, and nobody measures each.

        Only for matrices in the rule's dtype, stored by rows: of others an attempt would make
        copies in vain.
        """
        if not views or is_observed():
            return False
        recipe = views[0].recipe
        return (
            recipe.judged is not None
            and {id(recipe)}.issuperset([id(view.recipe) for view in views])
            and not any([view.sharded for view in views])
            and all([view.kept is view.dtype is view.gradient.dtype for view in views])
            and all(map(Tensor.is_contiguous, [view.parameter for view in views]))
            and (are_many(views) or all([_is_large(view.parameter) for view in views]))
        )

    def attempt(self, views: Sequence[View]) -> bool:
        """Take the step by a fused form that judges gradients by what it would keep of them."""
        found = [(view, _fused_step(view)) for view in views]
        steps = [(view, *step) for view, step in found if step is not None]
        moved = len(steps) == len(views) and views[0].recipe.judged([step for *_, step in steps])
        for view, target, _ in steps:
            if moved:
                view.written(target)
            else:
                view.state["step"] -= 1
        return moved

    def move(self, views: Sequence[View]) -> None:
        """Move sharded matrices by rows, whole ones by fused forms in one call, then all others."""
        self._by_transforms(self._by_fused(views, are_many(views)))

    def _by_fused(self, views: Sequence[View], many: bool) -> list[View]:
        """Move what rows or a fused form serve, small matrices if they are many; return others."""
        fused: dict[int, list[tuple[View, Tensor, FusedStep]]] = {}
        rows: list[View] = []
        rest: list[View] = []
        for view in views:
            recipe = view.recipe
            if view.sharded:
                (rows if by_rows(recipe, view) else rest).append(view)
            elif (
                recipe.fused is None
                or not (many or _is_large(view.parameter))
                or (step := _fused_step(view)) is None
            ):
                rest.append(view)
            else:
                fused.setdefault(id(recipe), []).append((view, *step))
        _move_rows(rows)
        for alike in fused.values():
            _take(alike)
        return rest

    def _by_transforms(self, views: Sequence[View], stacked: Collection[int] = ()) -> None:
        """Move matrices by their transforms; those of ``stacked`` indices also alone in a stack."""
        observed = is_observed()
        for recipe, alike in batches(views):
            first = alike[0]
            if len(alike) == 1 and not (observed or first.sharded or first.index in stacked):
                _move_alone(first, recipe)
                continue
            for view in alike:
                view.state["step"] += 1
            # Not sooner: matrices that are gathered would all be whole at once.
            batch = [view.placed(recipe) for view in alike]
            if batch[0].begun:
                _, recipe = recipe.parts
            with span("scale", [view.parameter for view in batch]):
                gradients = [view.matrix(view.gradient) for view in batch]
                stack = len(batch) > 1 or batch[0].index in stacked
                work = updates_of(recipe, batch, gradients, stack=stack)
                updates = batch[0].context().finished(work)
            for view, update in zip(batch, updates, strict=True):
                with span("update", [view.parameter]):
                    view.move(recipe, update)


def _move_alone(view: View, recipe: Recipe) -> None:
    """Move one matrix that lies here whole by its transforms, in few calls."""
    state = view.state
    state["step"] += 1
    weight = view.weight if recipe.needs_weight else None
    context = Context(state["step"], weight, (view.seed,))
    view.move(recipe, recipe.update(view.matrix(view.gradient), state, context))


def by_rows(recipe: Recipe, view: View) -> bool:
    """Return whether a recipe moves a sharded matrix by the rows that each rank has of it."""
    return recipe.row_local and shard_for(recipe, view.parameter, view.route.layout) is not None


def are_many(views: Sequence[View]) -> bool:
    """Return whether matrices are many enough for fused forms where each by itself is small."""
    return sum(map(Tensor.numel, [view.parameter for view in views])) >= LEAST_ELEMENTS


def _is_large(parameter: Tensor) -> bool:
    """Return whether a matrix is, by itself, large enough for a fused form."""
    return parameter.numel() >= BATCH_LIMIT


def _fused_step(view: View) -> tuple[Tensor, FusedStep] | None:
    """Count a step and return its target and operands; None where they are not stored alike."""
    target = view.target()
    weight, gradient = view.matrix(target), view.matrix(view.gradient)
    if weight is not target and weight.data_ptr() != target.data_ptr():
        return None
    # By rows or, as Keras stores kernels, by columns; but both alike.
    if weight.is_contiguous():
        stored = gradient.is_contiguous()
    else:
        stored = weight.mT.is_contiguous() and gradient.mT.is_contiguous()
    if not stored or (view.shard is not None and not weight.numel()):
        return None
    view.state["step"] += 1
    # No seeds: what draws has no fused form.
    context = Context(view.state["step"], None, (), shard=view.shard)
    state = view.state if view.shard is None else view.own_state
    return target, FusedStep(weight, gradient, state, context, float(view.group["lr"]), view.decay)


def _take(steps: Sequence[tuple[View, Tensor, FusedStep]]) -> None:
    fused = steps[0][0].recipe.fused
    # Who measures wants each matrix's time.
    for part in [[one] for one in steps] if is_observed() else [steps]:
        with span("update", [view.parameter for view, _, _ in part]):
            fused([step for _, _, step in part])
            for view, target, _ in part:
                view.written(target)


def _move_rows(views: Sequence[View]) -> None:
    """Move the rows that are here of sharded matrices, which sum over rows all together."""
    works = []
    for recipe, alike in batches(views):
        batch = [view.placed(recipe) for view in alike]
        shard = batch[0].shard
        assert shard is not None
        works.append((_rows_moved(recipe, batch), shard))
    if works:
        # Who measures has ranks send no more than they do otherwise.
        with span("update", [view.parameter for view in views]):
            together(works)


def _rows_moved(recipe: Recipe, batch: Sequence[View]) -> Summing[None]:
    """Move one large matrix by its fused form where that serves, else by transforms.

    A rank without rows has no fused step, and sums along with the others by transforms.
    """
    view = batch[0]
    fused = recipe.fused is not None and _is_large(view.parameter)
    step = _fused_step(view) if fused else None
    if step is None:
        for own in batch:
            own.state["step"] += 1
        gradients = [own.matrix(own.gradient) for own in batch]
        updates = yield from updates_of(recipe, batch, gradients, stack=len(batch) > 1)
        for own, update in zip(batch, updates, strict=True):
            own.move(recipe, update)
        return
    target, call = step
    if recipe.fused_rows is not None:
        yield from recipe.fused_rows(call)
    elif recipe.fused is not None:
        recipe.fused([call])
    view.written(target)


def batches(views: Sequence[View]) -> Iterator[tuple[Recipe, list[View]]]:
    """Yield runs of views that one call of their recipe may process together."""
    stacks: dict[Any, list[View]] = {}
    recipes: list[Recipe] = []
    recipe, kind = None, -1
    for view in views:
        if view.recipe is not recipe:
            recipe = view.recipe
            assert recipe is not None
            # Compared once, not for every view: its hash is a call for each of its settings.
            if recipe not in recipes:
                recipes.append(recipe)
            kind = recipes.index(recipe)
        # By shapes over all ranks, for ranks must form the same batches.
        m, n = view.route.layout.matrix_shape
        if not recipe.batched or m * n >= BATCH_LIMIT:
            stacks[view.index] = [view]
            continue
        cut = placement_of(view.parameter) if view.sharded else None
        key = (kind, m, n, view.dtype, view.parameter.device, view.state["step"], cut)
        stacks.setdefault(key, []).append(view)
    for stack in stacks.values():
        yield stack[0].recipe, stack


def updates_of(
    recipe: Recipe,
    batch: Sequence[View],
    gradients: Sequence[Tensor],
    weights: Sequence[Tensor] | None = None,
    *,
    stack: bool,
) -> Summing[Iterable[Tensor]]:
    """Run ``recipe`` on a batch and return one update matrix (m, n) for each view.

    Args:
        recipe: The recipe of all.
        batch: The matrices.
        gradients: What the recipe works on, (m, n) each.
        weights: The weights, (m, n) each; None has the views find them, where they are needed.
        stack: Whether to work on a stack, as for several; its products round in their own way.
    """
    first = batch[0]
    run = _whole if first.shard is None else Recipe.summing
    if weights is None and recipe.needs_weight:
        weights = [view.weight for view in batch]
    if not stack:
        context = first.context(weights[0] if weights else None)
        return [(yield from run(recipe, gradients[0], first.own_state, context))]
    tensors = [
        {k: local(v) for k, v in view.state.items() if isinstance(v, Tensor) and k != "master"}
        for view in batch
    ]
    stacked = stack_states(tensors) if tensors[0] else {}
    weight = torch.stack(list(weights)) if weights else None
    seeds = tuple(view.seed for view in batch)
    context = Context(first.state["step"], weight, seeds, shard=first.shard)
    updates = yield from run(recipe, torch.stack(list(gradients)), stacked, context)
    for position, state in enumerate(tensors):
        for key, value in state.items():
            value.copy_(stacked[key][position])
    return updates.unbind(0)


def _whole(recipe: Recipe, gradient: Tensor, state: State, context: Context) -> Summing[Tensor]:
    """Run a recipe on whole matrices, by calls that a profiler sees."""
    yield from ()
    return recipe.update(gradient, state, context)


def _matrix_state(recipe: Recipe, like: Tensor, layout: Layout) -> dict[str, Tensor]:
    """Return a recipe's fresh state for a parameter like ``like``.

    Of a sharded parameter a rank keeps what belongs to its own rows for transforms that need no
    more, and for the others the state of the whole matrix, as every other rank does.
    """
    shape, dtype = layout.matrix_shape, compute_dtype(like)
    whole = torch.empty(shape, dtype=dtype, device=like.device)
    if shard_for(recipe, like, layout) is None:
        return recipe.init(whole)
    own = rows_state(recipe, like, layout)
    return own if recipe.row_local else own | recipe.parts[1].init(whole)


def rows_state(recipe: Recipe, like: Tensor, layout: Layout) -> dict[str, Tensor]:
    """Return fresh state of the transforms that work on this rank's rows alone, none for none."""
    shard = shard_for(recipe, like, layout)
    if shard is None:
        return {}
    head = recipe if recipe.row_local else recipe.parts[0]
    shape = (shard.rows, layout.matrix_shape[1])
    rows = torch.empty(shape, dtype=compute_dtype(like), device=like.device)
    return wrapped_rows(head.init(rows), head.row_axes(rows), like, shard.total)
