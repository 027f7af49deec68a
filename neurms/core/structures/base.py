"""What a Fisher structure is: the seam on which optimizers, adapters and the extension meet.

A *structure* approximates the Fisher matrix of one layer, F ~ E[g g^T] with g = vec(G), and applies
(a root of) its inverse to a gradient. It knows nothing of modules, parameters or frameworks: it
sees matrices in the (units x features) view and a flat dictionary of state. A :class:`Transform` is
the wider notion, a step from one update matrix to the next; momentum, the norm-growth limiter and
the trust ratio are transforms too, which is why they compose with every structure.

Contract, tested for every structure by ``neurms.testing.TransformContract``:

- Matrices have shape (..., m, n): leading axes are a batch of equally shaped layers that are
  processed together; a result does not depend on what else is in the batch.
- ``init`` allocates *all* state, in its final shapes and dtypes, and also runs on meta tensors:
  that is how memory is predicted. Every state tensor starts with the matrix's batch axes.
- Later calls change state in place only, and never write into the matrices they are given.
- Matrices arrive as float32, or float64 for float64 parameters; results have the same dtype.
- A ``row_local`` transform may be given a rank's rows of a matrix alone, and m is
  :meth:`Context.units`. What it sums over rows it sums through :meth:`Context.summed`, or yields in
  :meth:`Transform.summing`, which sends the sums of all matrices together; equally often on every
  rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from neurms.core.ground.shards import RowShard
from neurms.core.ground.spans import span
from neurms.core.ground.sums import Summing, by_itself

__all__ = ["Context", "Moments", "State", "Structure", "Transform"]

State = dict[str, Tensor]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Moments:
    """Mean squares over rows of a layer's error signals and inputs in the current step.

    Args:
        units: mean_rows(D_i^2), shape (..., m), or None where D was not seen.
        features: mean_rows(H_j^2), shape (..., n), or None where H was not seen.
    """

    units: Tensor | None = None
    features: Tensor | None = None


@dataclass(frozen=True)
class Context:
    """What a transform may need beside the update itself.

    Args:
        step: Number of this step, counted from 1, of the matrices in the batch.
        weight: The weights in the same view, shape (..., m, n); only given to transforms with
            ``needs_weight``, else None.
        seeds: One integer for each matrix of the batch, in order; random draws derive from it and
            from ``step`` alone, so that a resumed run draws what an uninterrupted one would.
        moments: Second moments of D and H for structures that are built from them.
        shard: Which rows these are, where ranks share the matrices; None where they are whole.
    """

    step: int
    weight: Tensor | None = None
    seeds: tuple[int, ...] = (0,)
    moments: Moments | None = None
    shard: RowShard | None = None

    def summed(self, tensor: Tensor) -> Tensor:
        """Return a sum over this rank's rows summed over all rows, in place."""
        return tensor if self.shard is None else self.shard.sum_(tensor)

    def finished(self, work: Summing[_T]) -> _T:
        """Return what work on these matrices alone comes to that yields its sums over rows."""
        return by_itself(work, self.summed)

    def units(self, matrix: Tensor) -> int:
        """Return m, the number of rows on all ranks."""
        return matrix.shape[-2] if self.shard is None else self.shard.total

    def generator(self, index: int, stream: int = 0) -> torch.Generator:
        """Return a CPU generator made from matrix ``index``'s seed, the step and ``stream``."""
        mixed = (self.seeds[index] * 1_000_003 + self.step) * 1_000_003 + stream
        return torch.Generator().manual_seed(mixed % (2**63 - 1))


class Transform(ABC):
    """A step from one update matrix to the next, with state of its own.

    Subclasses are frozen dataclasses: their fields are the settings, checked in ``__post_init__``.
    """

    needs_weight: bool = False
    """Whether :attr:`Context.weight` must be given."""
    row_local: bool = False
    """Whether a rank's own rows are enough, so that sharded matrices need not be gathered."""
    any_scale: bool = False
    """Whether it works at any magnitude, its squares or their overflow doing no harm. Elsewhere
    gradients whose squares could overflow are refused, for state made of them would be lost."""

    least_features: int = 1
    """Fewest features n of a matrix that it can move at all: its updates are zero below."""
    least_units: int = 1
    """Fewest units m of a matrix that it can move at all."""

    def init(self, matrix: Tensor) -> State:
        """Return the state for matrices like ``matrix`` (..., m, n), possibly on meta."""
        return {}

    @abstractmethod
    def __call__(self, update: Tensor, state: State, context: Context) -> Tensor:
        """Return the transformed update (..., m, n) and bring ``state`` up to date in place."""

    def summing(self, update: Tensor, state: State, context: Context) -> Summing[Tensor]:
        """Do what a call does, but yield sums over the rows that are here and be sent the whole.

        Many matrices go through this side by side, so that what they send is one exchange. A
        transform that sums over rows overrides it; of any other this is the call.
        """
        yield from ()
        return self(update, state, context)


class Structure(Transform):
    """A Fisher structure: observe gradients, then precondition one."""

    @abstractmethod
    def observe(self, gradient: Tensor, state: State, context: Context) -> None:
        """Update ``state`` in place from one step's gradient (..., m, n)."""

    @abstractmethod
    def precondition(self, gradient: Tensor, state: State, context: Context) -> Tensor:
        """Return the preconditioned gradient (..., m, n); ``state`` is only read."""

    def __call__(self, update: Tensor, state: State, context: Context) -> Tensor:
        """Observe ``update``, then precondition it. Structures with another order override this."""
        with span("reduce"):
            self.observe(update, state, context)
        return self.precondition(update, state, context)
