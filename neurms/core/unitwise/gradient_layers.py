"""A matrix with its bias in one step of variant P, and which of them stay from step to step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import is_

from torch import Tensor

from neurms.core.ground.errors import UnsupportedTrainingError
from neurms.core.ground.shards import is_sharded, local, row_shard
from neurms.core.optimizers.recipe import Recipe
from neurms.core.optimizers.view import View
from neurms.core.routing import Route
from neurms.core.structures.gradient_moments import GradientMoments

__all__ = ["Alike", "Known", "Layer", "are_direct", "check_bias", "vector"]


@dataclass(slots=True, eq=False)
class Layer:
    """A matrix with its bias in one step.

    Args:
        weight: The matrix as its rule sees it: this rank's rows, or all of it.
        bias: Its bias, or None.
        structure: Its settings.
        moves: Whether the matrix has a gradient; without one it counts as zero.
        columns: n, without the bias.
        is_matrix: Whether it is stored as its rule sees it, and moves.
    """

    weight: View
    bias: View | None
    structure: GradientMoments
    moves: bool = True
    columns: int = field(init=False)
    is_matrix: bool = field(init=False)

    def __post_init__(self) -> None:
        layout = self.weight.route.layout
        self.columns = layout.matrix_shape[1]
        self.is_matrix = self.moves and layout.is_matrix and not self.weight.sharded

    @property
    def views(self) -> list[View]:
        """What moves."""
        own = [self.weight] if self.moves else []
        return own if self.bias is None else [*own, self.bias]

    def gradient(self) -> Tensor:
        """Return the gradient of the rows that are here, shape (m, n)."""
        return self.weight.matrix(self.weight.seen(self.weight.gradient))

    def average(self) -> Tensor:
        """Return the gradient's average so far, of the rows that are here, shape (m, n)."""
        return self.weight.matrix(self.weight.seen(self.weight.state["momentum"]))

    def bias_average(self) -> Tensor | None:
        """Return the average of the bias's gradient so far, shape (m,), or None."""
        if self.bias is None:
            return None
        return vector(self.bias, self.bias.state["momentum"], self.weight.shard is not None)

    def bias_gradient(self) -> Tensor | None:
        """Return the bias's gradient for the rows that are here, shape (m,), or None."""
        if self.bias is None:
            return None
        return vector(self.bias, self.bias.gradient, self.weight.shard is not None)


@dataclass(frozen=True, slots=True, eq=False)
class Alike:
    """Layers of one structure that all lie here whole: one call of each kernel takes them.

    Args:
        structure: Their settings.
        layers: The layers.
    """

    structure: GradientMoments
    layers: list[Layer]

    @classmethod
    def of(cls, layers: Sequence[Layer]) -> list[Alike]:
        """Return layers by their structures."""
        found: dict[GradientMoments, list[Layer]] = {}
        for layer in layers:
            found.setdefault(layer.structure, []).append(layer)
        return [cls(structure, own) for structure, own in found.items()]


class Known:
    """The layers of the last step, which those of the next one are if nothing has changed.

    Parameters and groups are compared through views, which an optimizer makes anew when those
    change; settings through the recipes that they make; routes by themselves.
    """

    def __init__(self) -> None:
        self._views: list[View] = []
        self._routes: list[Route] = []
        self._recipes: list[Recipe] = []
        self._alike: list[Alike] = []

    def of(self, views: Sequence[View]) -> list[Alike] | None:
        """Return the layers that views were the last time; None if they were not the same."""
        if (
            len(views) != len(self._views)
            or not all(map(is_, views, self._views))
            or not all(map(is_, [view.route for view in views], self._routes))
            or not all(map(is_, [view.recipe for view in views], self._recipes))
            or True in [view.sharded for view in views]
        ):
            return None
        return self._alike

    def keep(self, views: Sequence[View], alike: Sequence[Alike]) -> None:
        """Remember what views were, if all of them are in layers that lie here and move whole."""
        layers = [layer for own in alike for layer in own.layers]
        held = sum(len(layer.views) for layer in layers if layer.moves)
        kept = views if held == len(views) else ()
        self._views = list(kept)
        self._routes = [view.route for view in kept]
        self._recipes = [view.recipe for view in kept]
        self._alike = list(alike) if kept else []


def are_direct(layers: Sequence[Layer]) -> list[bool]:
    """Return which layers' weights, gradients and biases kernels take as they are stored."""
    return [
        layer.is_matrix
        and layer.weight.kept is layer.weight.dtype is layer.weight.gradient.dtype
        and (
            layer.bias is None
            or (
                layer.bias.kept is layer.bias.dtype is layer.bias.gradient.dtype
                and not layer.bias.sharded
            )
        )
        for layer in layers
    ]


def check_bias(bias: View, weight: View) -> None:
    """Raise unless a bias is cut as the rows of its matrix are.

    Raises:
        UnsupportedTrainingError: It is cut in another way.
    """
    shard = row_shard(bias.parameter, bias.route.layout) if is_sharded(bias.parameter) else None
    if shard is None or (shard.start, shard.rows) != (weight.shard.start, weight.shard.rows):  # type: ignore[union-attr]
        raise UnsupportedTrainingError(
            f"the bias {bias.route.name!r} is not sharded as the rows of {weight.route.name!r} "
            f"are; shard both alike, or pass exclude=({bias.route.name!r},)"
        )


def vector(view: View, tensor: Tensor, rows: bool) -> Tensor:
    """Return a tensor like a bias: this rank's ``rows``, or all of it, in the rule's dtype."""
    whole = local(tensor) if rows or not is_sharded(tensor) else tensor.full_tensor()  # type: ignore[attr-defined]
    return whole.to(view.dtype)
