"""Adapters that let a structure run on averaged gradients, on tiles, flattened or transposed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from neurms.core.ground.errors import check_fraction, check_positive_int
from neurms.core.structures.base import Context, State, Structure, Transform

__all__ = ["Averaged", "Flattened", "Tiled", "Transposed"]


@dataclass(frozen=True)
class Averaged(Structure):
    """Observe the gradient, but precondition its moving average, as Adam does.

    M <- beta M + (1 - beta) G, and the structure preconditions M / (1 - beta^t).

    Args:
        structure: Sees every raw gradient.
        beta: Decay of the average; 0 keeps no state and preconditions the gradient itself.
    """

    structure: Structure
    beta: float = 0.0

    def __post_init__(self) -> None:
        check_fraction("beta", self.beta)

    @property
    def needs_weight(self) -> bool:  # type: ignore[override]
        """Whether the structure reads the weight."""
        return self.structure.needs_weight

    def init(self, matrix: Tensor) -> State:
        """Return the structure's state and, with ``beta``, the average (..., m, n)."""
        state = self.structure.init(matrix)
        return {**state, "average": torch.zeros_like(matrix)} if self.beta else state

    def observe(self, gradient: Tensor, state: State, context: Context) -> None:
        """Let the structure and the average see the raw gradient."""
        self.structure.observe(gradient, state, context)
        if self.beta:
            state["average"].lerp_(gradient, 1.0 - self.beta)

    def precondition(self, gradient: Tensor, state: State, context: Context) -> Tensor:
        """Return the preconditioned average (..., m, n), of ``gradient`` where beta is 0."""
        if self.beta:
            gradient = state["average"] / (1.0 - self.beta**context.step)
        return self.structure.precondition(gradient, state, context)


@dataclass(frozen=True)
class Tiled(Transform):
    """Run a transform on tiles of at most ``block_size`` rows and columns, each with its own state.

    What costs d^3 time and d^2 memory for a side of length d then grows linearly with the matrix.

    Args:
        transform: Runs on each tile by itself.
        block_size: Largest side of a tile; the last tiles may be smaller.
    """

    transform: Transform
    block_size: int

    def __post_init__(self) -> None:
        check_positive_int("block_size", self.block_size)

    @property
    def needs_weight(self) -> bool:  # type: ignore[override]
        """Whether the transform reads the weight."""
        return self.transform.needs_weight

    def init(self, matrix: Tensor) -> State:
        """Return the state of every tile, its keys marked by the tile's position."""
        state: State = {}
        for mark, rows, columns in self._tiles(matrix):
            own = self.transform.init(matrix[..., rows, columns])
            state.update({key + mark: value for key, value in own.items()})
        return state

    def __call__(self, update: Tensor, state: State, context: Context) -> Tensor:
        """Return the transformed tiles, put together (..., m, n)."""
        result = torch.empty_like(update)
        for mark, rows, columns in self._tiles(update):
            own = {k.removesuffix(mark): v for k, v in state.items() if k.endswith(mark)}
            weight = None if context.weight is None else context.weight[..., rows, columns]
            tile_context = replace(context, weight=weight)
            tile = update[..., rows, columns]
            result[..., rows, columns] = self.transform(tile, own, tile_context)
        return result

    def _tiles(self, matrix: Tensor) -> Iterator[tuple[str, slice, slice]]:
        m, n = matrix.shape[-2:]
        size = self.block_size
        single = m <= size and n <= size
        for i, top in enumerate(range(0, m, size)):
            for j, left in enumerate(range(0, n, size)):
                mark = "" if single else f"@{i},{j}"
                yield mark, slice(top, top + size), slice(left, left + size)


@dataclass(frozen=True)
class Flattened(Transform):
    """Show a transform matrices of at most ``limit`` entries as a single row of mn features.

    Args:
        transform: Runs on the row, or on the matrix itself where that is larger.
        limit: Most entries of a matrix that is flattened; 0 flattens none.
    """

    transform: Transform
    limit: int

    def __post_init__(self) -> None:
        check_positive_int("limit", self.limit, low=0)

    @property
    def needs_weight(self) -> bool:  # type: ignore[override]
        """Whether the transform reads the weight."""
        return self.transform.needs_weight

    def init(self, matrix: Tensor) -> State:
        """Return the transform's state for what it will see."""
        return self.transform.init(self._seen(matrix))

    def __call__(self, update: Tensor, state: State, context: Context) -> Tensor:
        """Return the transformed update (..., m, n)."""
        weight = None if context.weight is None else self._seen(context.weight)
        seen = self.transform(self._seen(update), state, replace(context, weight=weight))
        return seen.reshape(update.shape)

    def _seen(self, matrix: Tensor) -> Tensor:
        if matrix.shape[-2] * matrix.shape[-1] > self.limit:
            return matrix
        return matrix.flatten(-2).unsqueeze(-2)


@dataclass(frozen=True)
class Transposed(Structure):
    """Show a structure G^T: its units are the features, its features the units.

    Around :class:`~neurms.core.structures.block_diagonal.BlockDiagonal` with blocks as large as a
    column it gives the general block-diagonal Fisher matrix Diag_B(M_1, ..., M_n): a full m x m
    matrix for each feature. State: the structure's, m^2 n numbers there.

    Args:
        structure: Runs on (..., n, m).

    Reference:
        Structured-Fisher paper, section 3: the most general block-diagonal structure, whose best
        fit has M_j = E[g_j g_j^T] for the columns g_j.

    Example:
        >>> import torch
        >>> from neurms.core.structures.block_diagonal import BlockDiagonal
        >>> structure = Transposed(BlockDiagonal(beta=0.0, eps=1e-12, block_size=2))
        >>> gradient = torch.tensor([[3.0, 0.0], [4.0, 5.0]])
        >>> structure(gradient, structure.init(gradient), Context(step=1))
        tensor([[0.6000, 0.0000],
                [0.8000, 1.0000]])
    """

    structure: Structure

    @property
    def needs_weight(self) -> bool:  # type: ignore[override]
        """Whether the structure reads the weight."""
        return self.structure.needs_weight

    def init(self, matrix: Tensor) -> State:
        """Return the structure's state for matrices (..., n, m)."""
        return self.structure.init(matrix.mT)

    def observe(self, gradient: Tensor, state: State, context: Context) -> None:
        """Let the structure observe G^T."""
        self.structure.observe(gradient.mT, state, self._turned(context))

    def precondition(self, gradient: Tensor, state: State, context: Context) -> Tensor:
        """Return the preconditioned gradient (..., m, n)."""
        return self.structure.precondition(gradient.mT, state, self._turned(context)).mT

    def __call__(self, update: Tensor, state: State, context: Context) -> Tensor:
        """Return what the structure makes of the transpose, transposed back (..., m, n)."""
        return self.structure(update.mT, state, self._turned(context)).mT

    def _turned(self, context: Context) -> Context:
        return context if context.weight is None else replace(context, weight=context.weight.mT)
