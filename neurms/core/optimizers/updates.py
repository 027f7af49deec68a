"""How parameters move: the state that each keeps, and what one step writes into it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from neurms.core.ground.layout import Layout
from neurms.core.ground.precision import compute_dtype, write_
from neurms.core.ground.shards import (
    is_sharded,
    local,
    local_state,
    own_part,
    row_shard,
    wrapped_rows,
)
from neurms.core.ground.spans import span
from neurms.core.optimizers.fallback import adamw_state, adamw_update_
from neurms.core.optimizers.groups import GroupedParameters
from neurms.core.optimizers.recipe import FusedStep, Recipe
from neurms.core.optimizers.work import BATCH_LIMIT, Item, batches, shard_for, updates_of
from neurms.core.routing import FALLBACK, Route
from neurms.core.structures.base import Context

__all__ = ["ParameterUpdates"]


class ParameterUpdates(GroupedParameters):
    """What a step does to parameters whose gradients have been found good.

    A matrix under a rule moves by its recipe's fused form where that serves, else by the recipe's
    transforms, in batches; everything else moves by AdamW. The step inherits these methods, as an
    object of their own would cost it more calls, which are dear where caches are cold.
    """

    # ---------------------------------------------------------------- all that move in a step

    def _update(self, items: Sequence[Item]) -> None:
        self._prepare(items)
        fallback = [item for item in items if item.rule == FALLBACK]
        self._update_fallback(fallback)
        self._update_rule([item for item in items if item.rule != FALLBACK])

    def _prepare(self, items: Sequence[Item]) -> None:
        """Make the state of parameters that move for the first time."""
        for item in items:
            if not self.state[item.parameter]:
                self.state[item.parameter].update(self._new_state(item.parameter, item.group))

    def _update_rule(self, items: Sequence[Item]) -> None:
        if rest := [item for item in items if not self._moves_at_once(item)]:
            self._update_by_transforms(rest)

    def _update_by_transforms(self, items: Sequence[Item]) -> None:
        made = {id(item.group): self._recipe(item.group) for item in items}
        recipes = [made[id(item.group)] for item in items]
        for recipe, alike in batches(items, recipes, self.state):
            states = [self.state[item.parameter] for item in alike]
            for state in states:
                state["step"] += 1
            # Not sooner: matrices that are gathered would all be whole at once.
            batch = [item.placed(recipe, s) for item, s in zip(alike, states, strict=True)]
            if batch[0].begun:
                _, recipe = recipe.parts
            with span("scale", [item.parameter for item in batch]):
                gradients = [self._matrix(item, item.gradient) for item in batch]
                updates = updates_of(recipe, batch, gradients, states)
            for item, update in zip(batch, updates, strict=True):
                with span("update", [item.parameter]):
                    self._apply(item, recipe, update)

    def _moves_at_once(self, item: Item) -> bool:
        """Take a large matrix's step by its recipe's fused form; return whether it could."""
        parameter = item.parameter
        if parameter.numel() < BATCH_LIMIT:
            return False
        recipe = self._recipe(item.group)
        if recipe.fused is None:
            return False
        if is_sharded(parameter):
            if not recipe.row_local or row_shard(parameter, item.route.layout) is None:
                return False
            with span("update", [parameter]):
                moved = self._fused(recipe.fused, item.placed(recipe, self.state[parameter]))
            if not moved:
                # A rank without rows sums along with the others, in the same order as they.
                self._update_by_transforms([item])
            return True
        with span("update", [parameter]):
            return self._fused(recipe.fused, item)

    def _fused(self, fused: Callable[[FusedStep], None], item: Item) -> bool:
        target = self._target(item)
        weight = self._matrix(item, target)
        if weight is not target and weight.data_ptr() != target.data_ptr():
            return False
        if not weight.numel():
            return False
        gradient = self._matrix(item, item.gradient)
        # By rows or, as Keras stores kernels, by columns; but both alike.
        if weight.is_contiguous():
            stored = gradient.is_contiguous()
        else:
            stored = weight.mT.is_contiguous() and gradient.mT.is_contiguous()
        if not stored:
            return False
        state, lr = self.state[item.parameter], float(item.group["lr"])
        state["step"] += 1
        decay = 1.0 - lr * item.group["weight_decay"]
        context = Context(state["step"], seeds=(item.seed,), shard=item.shard)
        own = state if item.shard is None else local_state(state)
        fused(FusedStep(weight, gradient, own, context, lr, decay))
        self._written(item, target)
        return True

    def _update_fallback(self, items: Sequence[Item]) -> None:
        for group in {id(item.group): item.group for item in items}.values():
            own = [item for item in items if item.group is group]
            with span("update", [item.parameter for item in own]):
                self._update_by_adamw(own, group)

    def _update_by_adamw(self, own: Sequence[Item], group: Mapping[str, Any]) -> None:
        targets = [self._target(item) for item in own]
        gradients = [local(item.gradient) for item in own]
        adamw_update_(
            targets,
            [g.to(target.dtype) for g, target in zip(gradients, targets, strict=True)],
            [self.state[item.parameter] for item in own],
            lr=self.fallback_lr(group),
            betas=tuple(group["fallback_betas"]),
            weight_decay=group["fallback_weight_decay"],
        )
        for item, target in zip(own, targets, strict=True):
            self._written(item, target)

    @staticmethod
    def fallback_lr(group: Mapping[str, Any]) -> float:
        """Return AdamW's current rate: ``fallback_lr``, scaled as ``lr`` has been meanwhile."""
        base = group["base_lr"]
        return float(group["fallback_lr"] * (float(group["lr"]) / base if base else 1.0))

    # ---------------------------------------------------------------- one parameter

    def _matrix(self, item: Item, tensor: Tensor) -> Tensor:
        dtype = compute_dtype(item.parameter)
        return item.layout.matrix(tensor if tensor.dtype is dtype else tensor.to(dtype))

    def _target(self, item: Item) -> Tensor:
        """Return the tensor to update: the parameter, its master copy, or a float32 copy.

        Of a sharded one it is what this rank holds.
        """
        parameter = item.parameter
        if parameter.dtype == compute_dtype(parameter):
            return local(parameter)
        master = self.state[parameter].get("master")
        if master is not None:
            return local(master)
        return local(parameter).to(compute_dtype(parameter))

    def _written(self, item: Item, target: Tensor) -> None:
        """Bring the parameter up to date after its :meth:`_target` was changed."""
        if target.dtype != item.parameter.dtype:
            step = self.state[item.parameter]["step"]
            generator = torch.Generator().manual_seed((item.seed * 1_000_003 + step) % 2**63)
            write_(local(item.parameter), target, self.low_precision, generator)

    def _apply(self, item: Item, recipe: Recipe, update: Tensor) -> None:
        lr, decay = float(item.group["lr"]), item.group["weight_decay"]
        if self.state[item.parameter]["step"] < recipe.decay_from:
            decay = 0.0
        target = self._target(item)
        if decay and recipe.decay == "before":
            target.mul_(1.0 - lr * decay)
        step = item.layout.from_matrix(update)
        target.add_(step if item.shard else own_part(step, item.parameter), alpha=-lr)
        if decay and recipe.decay == "after":
            target.mul_(1.0 - lr * decay)
        self._written(item, target)

    # ---------------------------------------------------------------- state

    def _new_state(self, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return all of a parameter's state; runs on meta tensors to predict memory."""
        return self.state_for(parameter, self._routes[parameter], group)

    def state_for(self, like: Tensor, route: Route, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return fresh state for a parameter like ``like`` (which may be on the meta device)."""
        if route.is_fallback:
            state = adamw_state(like)
        else:
            state = {"step": 0, **_matrix_state(self._recipe(group), like, route.layout)}
        if self.low_precision == "master" and compute_dtype(like) != like.dtype:
            state["master"] = like.detach().to(compute_dtype(like), copy=True)
        return state

    def expected_state(
        self, like: Tensor, parameter: Tensor, group: Mapping[str, Any], saved: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the keys and shapes that a checkpoint must hold for ``parameter``."""
        return self.state_for(like, self._routes[parameter], group)


def _matrix_state(recipe: Recipe, like: Tensor, layout: Layout) -> dict[str, Tensor]:
    """Return a recipe's fresh state for a parameter like ``like``.

    Of a sharded parameter a rank keeps what belongs to its own rows for transforms that need no
    more, and for the others the state of the whole matrix, as every other rank does.
    """
    shard = shard_for(recipe, like, layout)
    shape, dtype = layout.matrix_shape, compute_dtype(like)
    whole = torch.empty(shape, dtype=dtype, device=like.device)
    if shard is None:
        return recipe.init(whole)
    head, rest = (recipe, None) if recipe.row_local else recipe.parts
    rows = whole.new_empty((shard.rows, shape[1]))
    own = wrapped_rows(head.init(rows), head.row_axes(rows), like, shard.total)
    return own if rest is None else own | rest.init(whole)
