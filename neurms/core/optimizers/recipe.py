"""A recipe: which transforms, in which order, make an optimizer's update."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from neurms.core.ground.precision import compute_dtype
from neurms.core.ground.sums import Summing
from neurms.core.structures.base import Context, State, Transform
from neurms.core.transforms.momentum import Momentum

__all__ = ["FusedStep", "Recipe"]


class FusedStep(NamedTuple):
    """What a fused step works on: one matrix, its state, and the rates of its group.

    Args:
        weight: W as a contiguous (m, n) view; overwritten.
        gradient: G, the same shape; left as it is.
        state: The recipe's state; brought up to date in place.
        context: The step's number, and which rows these are where ranks share the matrix.
        lr: Learning rate.
        decay: 1 - lr wd.
    """

    weight: Tensor
    gradient: Tensor
    state: State
    context: Context
    lr: float
    decay: float

    @property
    def step(self) -> int:
        """Number of this step, counted from 1."""
        return self.context.step

    def scalar(self, value: float) -> Tensor:
        """Return a number as a 0-d tensor, as kernels take it: schedules do not recompile."""
        return _scalar(value)


@functools.lru_cache(maxsize=64)
def _scalar(value: float) -> Tensor:
    # Kept, because kernels only read it and making one costs more than a small kernel.
    return torch.tensor(value, dtype=torch.float64, device="cpu")


@dataclass(frozen=True)
class Recipe:
    """Transforms applied in turn to a gradient, and how the result reaches the weight.

    With update U = scale * T_k(...T_1(G)), the weight moves by W <- (1 - lr wd) W - lr U
    (``decay="before"``), by W <- (1 - lr wd) (W - lr U) (``"after"``, as GaLore, Fira and SOAP do)
    or by W <- W - lr U where a transform of the recipe already took care of the decay (``"none"``).

    Args:
        transforms: Structure and safeguards, in order.
        scale: Constant factor of the update.
        decay: Where decoupled weight decay enters.
        decay_from: First step, counted from 1, at which the decay applies; methods whose first
            steps only initialise start later.
        batched: Whether small matrices of the same shape are stacked and processed together.
        fused: The same step for several matrices in fewer passes over them and fewer calls; None
            where the transforms are the only way.
        judged: What ``fused`` does, if what it would keep shows that gradients are good; returns
            whether it has. None where gradients have to be looked at first.
        fused_rows: What ``fused`` does, for a rank's rows of a matrix; yields what it sums over
            rows. None where ``fused`` sums nothing.
        fused_tail: What follows the momentum, likewise; the momentum comes in the gradient's place.
        by_rows: Whether a rank may work on its own rows alone, where every transform can.
    """

    transforms: tuple[Transform, ...]
    scale: float = 1.0
    decay: Literal["before", "after", "none"] = "before"
    decay_from: int = 1
    batched: bool = True
    fused: Callable[[Sequence[FusedStep]], None] | None = None
    judged: Callable[[Sequence[FusedStep]], bool] | None = None
    fused_rows: Callable[[FusedStep], Summing[None]] | None = None
    fused_tail: Callable[[Sequence[FusedStep]], None] | None = None
    by_rows: bool = True

    @functools.cached_property
    def needs_weight(self) -> bool:
        """Whether a transform reads the weight."""
        return any(transform.needs_weight for transform in self.transforms)

    @functools.cached_property
    def row_local(self) -> bool:
        """Whether a rank works on its own rows alone, which are enough for every transform."""
        return self.by_rows and all(transform.row_local for transform in self.transforms)

    @functools.cached_property
    def any_scale(self) -> bool:
        """Whether no transform minds how large a gradient is."""
        return all(transform.any_scale for transform in self.transforms)

    @functools.cached_property
    def least_units(self) -> int:
        """Fewest units of a matrix that every transform can move."""
        return max((transform.least_units for transform in self.transforms), default=1)

    @functools.cached_property
    def least_features(self) -> int:
        """Fewest features of a matrix that every transform can move."""
        return max((transform.least_features for transform in self.transforms), default=1)

    def greatest(self, like: Tensor) -> float:
        """Return the magnitude up to which gradients of a matrix like ``like`` can be worked on.

        Norms of what is below it do not overflow or, where a transform keeps squares, sums of them
        over the whole matrix: with a factor of 4 to spare.
        """
        greatest = torch.finfo(compute_dtype(like)).max
        if self.any_scale:
            return greatest / 2.0 / math.sqrt(like.numel())
        return math.sqrt(greatest / like.numel()) / 2.0

    @functools.cached_property
    def parts(self) -> tuple[Recipe, Recipe]:
        """This recipe in two: the row-local transforms that it begins with, and all others."""
        count = next((i for i, t in enumerate(self.transforms) if not t.row_local), 0)
        head = Recipe(self.transforms[:count], batched=False)
        return head, replace(self, transforms=self.transforms[count:])

    @functools.cached_property
    def momentum(self) -> Momentum:
        """The transform that averages, of a recipe that has one."""
        return next(t for t in self.transforms if isinstance(t, Momentum))

    @functools.cached_property
    def tail(self) -> Recipe:
        """What follows the momentum, for which M takes the gradient's place."""
        after = self.transforms[self.transforms.index(self.momentum) + 1 :]
        return replace(self, transforms=after, fused=self.fused_tail, judged=None)

    def row_axes(self, matrix: Tensor) -> dict[str, int | None]:
        """Return which axis of each state tensor counts the rows of ``matrix`` (m, n), or None."""
        m, n = matrix.shape
        sizes = (torch.empty((rows, n), dtype=matrix.dtype, device="meta") for rows in (m, m + 1))
        fewer, more = (self.init(size) for size in sizes)
        return {
            key: next((a for a, size in enumerate(t.shape) if size != more[key].shape[a]), None)
            for key, t in fewer.items()
        }

    def init(self, matrix: Tensor) -> State:
        """Return the joint state of all transforms for matrices like ``matrix``."""
        state: State = {}
        for transform in self.transforms:
            own = transform.init(matrix)
            if clash := own.keys() & state.keys():
                raise ValueError(f"two transforms of a recipe both keep {sorted(clash)}")
            state.update(own)
        return state

    def update(self, gradient: Tensor, state: State, context: Context) -> Tensor:
        """Return U of shape (..., m, n) for a gradient, without touching it."""
        update = gradient
        for transform in self.transforms:
            update = transform(update, state, context)
        return self._scaled(update)

    def summing(self, gradient: Tensor, state: State, context: Context) -> Summing[Tensor]:
        """Return U for a rank's rows of a gradient (..., m, n), yielding sums over rows."""
        update = gradient
        for transform in self.transforms:
            update = yield from transform.summing(update, state, context)
        return self._scaled(update)

    def _scaled(self, update: Tensor) -> Tensor:
        return update if self.scale == 1.0 else update * self.scale


def stack_states(states: Sequence[State]) -> State:
    """Return one state whose tensors are the given ones stacked along a new first axis."""
    return {key: torch.stack([state[key] for state in states]) for key in states[0]}
