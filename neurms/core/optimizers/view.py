"""One parameter in one step: what its rule sees of it, and how the result gets back."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from neurms.core.ground.layout import Layout
from neurms.core.ground.precision import LowPrecision, compute_dtype, write_
from neurms.core.ground.shards import (
    RowShard,
    is_sharded,
    local,
    local_state,
    own_part,
    placed_like,
    rewrapped,
    row_shard,
)
from neurms.core.optimizers.recipe import Recipe
from neurms.core.routing import Route
from neurms.core.structures.base import Context, State

__all__ = ["View", "seed_of", "shard_for"]


@dataclass(slots=True, eq=False)
class View:
    """A parameter with its gradient, its settings and its state.

    Dtype, layout and shard are found once, when the view is made: an optimizer keeps its views from
    step to step and puts the new gradient in.

    Args:
        index: Counts parameters over all groups.
        route: The parameter's rule and layout.
        group: Its settings.
        state: Its state; empty before its first step.
        gradient: The gradient of this step.
        low_precision: How results are rounded into a bfloat16 or float16 parameter.
        shard: Which rows of a sharded matrix the rule works on here; None is the whole of it.
        begun: Whether the recipe's row-local beginning has been through the gradient already.
        recipe: What its mover makes of its settings, once a step has asked.
        bound: The largest magnitude that its gradient may have; until a mover says, any finite one.
    """

    index: int
    route: Route
    group: dict[str, Any]
    state: dict[str, Any]
    gradient: Tensor
    low_precision: LowPrecision = "nearest"
    shard: RowShard | None = None
    begun: bool = False
    parameter: Tensor = field(init=False)
    kept: torch.dtype = field(init=False)
    dtype: torch.dtype = field(init=False)
    sharded: bool = field(init=False)
    empty: bool = field(init=False)
    device: torch.device = field(init=False)
    hollow: bool = field(init=False)
    recipe: Any = None
    bound: float = math.inf

    def __post_init__(self) -> None:
        self.parameter = self.route.parameter
        self.look()

    def look(self) -> None:
        """Look at the parameter anew: its model may have been moved to another dtype or device."""
        parameter = self.parameter
        self.kept, self.device = parameter.dtype, parameter.device
        self.dtype = compute_dtype(parameter)
        self.sharded = is_sharded(parameter)
        self.empty = parameter.numel() == 0
        # Without numbers: whoever takes a step on such wants to know what it allocates.
        self.hollow = self.device.type == "meta" or isinstance(parameter, FakeTensor)
        if self.recipe is None:
            self.bound = torch.finfo(self.dtype).max if self.dtype.is_floating_point else math.inf

    def reroute(self, route: Route) -> None:
        """Give the parameter to another rule, for which it has no state yet."""
        self.route, self.recipe, self.state = route, None, {}
        self.look()

    # ---------------------------------------------------------------- what the rule sees

    @property
    def rule(self) -> str:
        """The rule that takes it."""
        return self.route.rule

    @property
    def seed(self) -> int:
        """Seed of the parameter's random draws: its state's, else one made of its name."""
        if "seed" in self.state:
            return int(self.state["seed"])
        # Checkpoints of earlier releases have none.
        return seed_of(self.route, self.group)

    @property
    def layout(self) -> Layout:
        """The layout of what :meth:`seen` returns."""
        return self.shard.layout(self.route.layout) if self.shard else self.route.layout

    @property
    def own_state(self) -> State:
        """The state that goes with what :meth:`seen` returns."""
        return self.state if self.shard is None else local_state(self.state)

    def seen(self, tensor: Tensor) -> Tensor:
        """Return what the rule sees of the parameter or of a tensor like it.

        That is this rank's rows, or all of it: then every rank must call this, for it gathers.
        """
        if not self.sharded:
            return tensor
        if self.shard is not None or not is_sharded(tensor):
            return local(tensor)
        whole: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
        return whole

    def matrix(self, tensor: Tensor) -> Tensor:
        """Return a tensor of :meth:`seen`'s shape as (units, features), in the rule's dtype."""
        # Most are matrices as they are; where caches are cold, calls cost more than what they do.
        if tensor.dtype is self.dtype and self.shard is None and self.route.layout.is_matrix:
            return tensor
        return self.layout.matrix(tensor if tensor.dtype is self.dtype else tensor.to(self.dtype))

    @property
    def weight(self) -> Tensor:
        """The parameter as the rule sees it, (units, features); its master copy if there is one."""
        return self.matrix(self.seen(self.state.get("master", self.parameter)))

    def context(self, weight: Tensor | None = None) -> Context:
        """Return what a transform may need beside the update."""
        return Context(self.state["step"], weight, (self.seed,), shard=self.shard)

    # ---------------------------------------------------------------- what is written

    @property
    def decay(self) -> float:
        """1 - lr weight_decay."""
        return 1.0 - float(self.group["lr"]) * float(self.group["weight_decay"])

    def target(self) -> Tensor:
        """Return the tensor to update: the parameter, its master copy, or a float32 copy.

        Of a sharded one it is what this rank holds. Call :meth:`written` after changing it.
        """
        if self.kept is self.dtype:
            return local(self.parameter) if self.sharded else self.parameter
        master = self.state.get("master")
        if master is not None:
            return local(master)
        return local(self.parameter).to(self.dtype)

    def written(self, target: Tensor) -> None:
        """Bring the parameter up to date after its :meth:`target` was changed."""
        if self.kept is not self.dtype:
            generator = torch.Generator().manual_seed(
                (self.seed * 1_000_003 + self.state["step"]) % 2**63
            )
            write_(local(self.parameter), target, self.low_precision, generator)

    def move(self, recipe: Recipe, update: Tensor) -> None:
        """Move the parameter by a recipe's update (units, features), weight decay included."""
        if not self.sharded:
            layout = self.route.layout
            self.advance(recipe, update if layout.is_matrix else layout.from_matrix(update))
            return
        step = self.layout.from_matrix(update)
        self.advance(recipe, step if self.shard else own_part(step, self.parameter))

    def advance(self, recipe: Recipe, step: Tensor) -> None:
        """Move what this rank holds of the parameter by its part of a step of its shape."""
        rate = float(self.group["lr"])
        decay = self.decay if self.state["step"] >= recipe.decay_from else 1.0
        plain = self.kept is self.dtype and not self.sharded
        target = self.parameter if plain else self.target()
        if decay != 1.0 and recipe.decay == "before":
            target.mul_(decay)
        target.add_(step, alpha=-rate)
        if decay != 1.0 and recipe.decay == "after":
            target.mul_(decay)
        if not plain:
            self.written(target)

    # ---------------------------------------------------------------- ranks

    def placed(self, recipe: Recipe) -> View:
        """Return the view with a sharded gradient as its recipe wants to see it.

        A recipe that is not row-local as a whole has taken its first steps, on rows, by then: what
        is gathered for :attr:`Recipe.parts`' second half is what the first made of the gradient.
        """
        if not self.sharded:
            return self
        own = replace(self, shard=shard_for(recipe, self.parameter, self.route.layout))
        if recipe.row_local or own.shard is None:
            own.gradient = own.seen(self.gradient)
            return own
        part = rewrapped(own._begin(recipe), self.parameter)
        return replace(self, gradient=self.seen(part), begun=True)

    def part(self, recipe: Recipe) -> tuple[Tensor, bool]:
        """Return this rank's part of what a sharded matrix's owner works on.

        Returns:
            The part, and whether the recipe's row-local beginning has been through it already.
        """
        own = replace(self, shard=shard_for(recipe, self.parameter, self.route.layout))
        if own.shard is None:
            return local(placed_like(self.gradient, self.parameter)), False
        return own._begin(recipe), True

    def _begin(self, recipe: Recipe) -> Tensor:
        """Return what the row-local beginning of a recipe makes of this rank's rows."""
        head, _ = recipe.parts
        rows = self.matrix(local(self.gradient))
        update = head.update(rows, self.own_state, self.context(_weight_for(head, self)))
        return self.layout.from_matrix(update)


def seed_of(route: Route, group: Mapping[str, Any]) -> int:
    """Return the seed of a parameter's draws, from its name: no order of groups matters.

    It fits in 63 bits, so that a tensor can hold it.
    """
    return _mixed(route.name, int(group.get("seed", 0)))


@functools.lru_cache(maxsize=4096)
def _mixed(name: str, seed: int) -> int:
    return (zlib.crc32(name.encode()) + (seed << 32)) % 2**63


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


def _weight_for(recipe: Recipe, view: View) -> Tensor | None:
    return view.weight if recipe.needs_weight else None
