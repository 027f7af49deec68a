"""How a tensor is seen as units x features.

Every method of the library speaks of a weight as a matrix with one row per *unit* (output) and one
column per *feature* (input). Frameworks store weights otherwise: a convolution has kernel taps and
groups, a transposed convolution has its inputs first, a Keras kernel has its outputs last. A
:class:`Layout` holds that knowledge once, so that structures, optimizers and adapters share it.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch import Tensor, nn

__all__ = ["Layout", "default_layout", "is_features_first", "layout_of"]


@dataclass(frozen=True)
class Layout:
    """The units x features view of one parameter.

    ``unit_axes``, ``feature_axes`` and ``tap_axes`` partition the parameter's axes. With ``groups``
    above 1 the axes named by ``grouped`` hold all groups one after the other, while the other side
    holds one group's share, as torch stores grouped convolutions.

    Args:
        shape: The parameter's shape.
        unit_axes: Axes that count outputs.
        feature_axes: Axes that count inputs.
        tap_axes: Axes over kernel positions, whose taps share a feature's statistics.
        groups: Number of independent blocks (grouped and depthwise convolutions).
        grouped: Which side's axes run over all groups: ``"units"`` (convolutions) or ``"features"``
            (transposed convolutions).

    Example:
        >>> import torch
        >>> conv = torch.nn.Conv2d(4, 6, 3, groups=2)
        >>> layout = layout_of(conv, "weight")
        >>> layout.units, layout.features, layout.groups, layout.taps
        (6, 4, 2, 9)
        >>> tuple(layout.blocks(conv.weight).shape)
        (2, 3, 2, 9)
        >>> tuple(layout.matrix(conv.weight).shape)
        (6, 18)
    """

    shape: tuple[int, ...]
    unit_axes: tuple[int, ...]
    feature_axes: tuple[int, ...]
    tap_axes: tuple[int, ...] = ()
    groups: int = 1
    grouped: Literal["units", "features"] = "units"

    @cached_property
    def units(self) -> int:
        """Number of outputs m, over all groups."""
        return self._size(self.unit_axes) * (self.groups if self.grouped == "features" else 1)

    @cached_property
    def features(self) -> int:
        """Number of inputs n, over all groups and without kernel taps."""
        return self._size(self.feature_axes) * (self.groups if self.grouped == "units" else 1)

    @cached_property
    def taps(self) -> int:
        """Number of kernel positions that share one feature (1 for a linear layer)."""
        return self._size(self.tap_axes)

    @cached_property
    def matrix_shape(self) -> tuple[int, int]:
        """Shape of :meth:`matrix`: (units, features per group x taps)."""
        return self.units, self.features // self.groups * self.taps

    def matrix(self, tensor: Tensor) -> Tensor:
        """Return ``tensor`` as (units, features per group x taps), a view if strides allow it."""
        if self.is_matrix:
            return tensor
        if self.groups > 1 and self.grouped == "features":
            return self.blocks(tensor).reshape(self.matrix_shape)
        return tensor.permute(self._order).reshape(self.matrix_shape)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """Return a (units, features per group x taps) matrix in the parameter's own shape."""
        if self.groups > 1 and self.grouped == "features":
            unit_sizes = [self.shape[a] for a in self.unit_axes]
            feature_sizes = [self.shape[a] for a in self.feature_axes]
            feature_sizes[0] //= self.groups
            tap_sizes = [self.shape[a] for a in self.tap_axes]
            split = matrix.reshape(self.groups, *unit_sizes, *feature_sizes, *tap_sizes)
            joined = split.movedim(0, len(unit_sizes)).flatten(len(unit_sizes), len(unit_sizes) + 1)
            return joined.permute(self._inverse_order)
        return matrix.reshape([self.shape[a] for a in self._order]).permute(self._inverse_order)

    def blocks(self, tensor: Tensor) -> Tensor:
        """Return ``tensor`` as (groups, units/groups, features/groups, taps).

        Always a view of ``tensor``, so that in-place kernels reach the parameter itself.

        Raises:
            RuntimeError: The strides of ``tensor`` allow no such view (from torch's ``view``).
        """
        if self.groups == 1:
            ordered = tensor.permute(self._order)
            return _merge(
                ordered, (len(self.unit_axes), len(self.feature_axes), len(self.tap_axes))
            )[None]
        axis = (self.unit_axes if self.grouped == "units" else self.feature_axes)[0]
        split = tensor.unflatten(axis, (self.groups, self.shape[axis] // self.groups))
        order = [axis] + [a + 1 if a >= axis else a for a in self._order]
        counts = (1, len(self.unit_axes), len(self.feature_axes), len(self.tap_axes))
        return _merge(split.permute(order), counts)

    def unit_factors(self, factors: Tensor) -> Tensor:
        """Return factors (units,) in a shape that broadcasts against :meth:`blocks`."""
        return factors.reshape(self.groups, self.units // self.groups, 1, 1)

    def feature_factors(self, factors: Tensor) -> Tensor:
        """Return factors (features,) in a shape that broadcasts against :meth:`blocks`."""
        return factors.reshape(self.groups, 1, self.features // self.groups, 1)

    def _size(self, axes: tuple[int, ...]) -> int:
        return math.prod(self.shape[a] for a in axes)

    @cached_property
    def is_matrix(self) -> bool:
        """Whether parameters are units x features already, as a torch linear layer's are."""
        return len(self.shape) == 2 and self.groups == 1 and self._order == (0, 1)

    @cached_property
    def _order(self) -> tuple[int, ...]:
        return self.unit_axes + self.feature_axes + self.tap_axes

    @property
    def _inverse_order(self) -> list[int]:
        order = self._order
        return [order.index(axis) for axis in range(len(order))]


def default_layout(tensor: Tensor) -> Layout:
    """Return the layout of a bare tensor: axis 0 counts units, all others features.

    This is RMNP's and Muon's "flattened to (units, features)" and torch's order for linear layers
    and ungrouped convolutions. Tensors with fewer than two axes become a single row.
    """
    axes = tuple(range(tensor.ndim))
    if tensor.ndim < 2:
        return Layout(tuple(tensor.shape), (), axes)
    return Layout(tuple(tensor.shape), axes[:1], axes[1:])


def layout_of(module: nn.Module, name: str, parameter: Tensor | None = None) -> Layout | None:
    """Return the layout of ``module``'s own parameter ``name``, or None where none is known.

    Args:
        module: The module that holds the parameter.
        name: The parameter's name in the module, such as ``"weight"``.
        parameter: What the module's ``name`` is made of where it holds no such parameter itself;
            None takes the one that it holds.

    Returns:
        The layout of the ``weight`` of a Linear, a convolution of 1 to 3 dimensions (grouped,
        transposed), an Embedding (units = embedding dimension, features = tokens) or the ``Conv1D``
        of Hugging Face's GPT-2 (a linear layer whose weight is stored features first); None for
        anything else.
    """
    if name != "weight":
        return None
    weight = module._parameters.get("weight") if parameter is None else parameter
    if weight is None:
        return None
    shape = tuple(weight.shape)
    if isinstance(module, nn.modules.conv._ConvNd):
        if len(shape) != len(module.kernel_size) + 2:
            return None
        taps = tuple(range(2, len(shape)))
        if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
            return Layout(shape, (1,), (0,), taps, module.groups, "features")
        return Layout(shape, (0,), (1,), taps, module.groups)
    if len(shape) != 2:
        return None
    if isinstance(module, nn.Linear):
        return Layout(shape, (0,), (1,))
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or is_features_first(module):
        return Layout(shape, (1,), (0,))
    return None


def is_features_first(module: nn.Module) -> bool:
    """Return whether a module is Hugging Face's ``Conv1D``, which computes x W + b."""
    # Looked up, not imported: no such module exists before Transformers is loaded.
    home = sys.modules.get("transformers.pytorch_utils")
    return home is not None and isinstance(module, home.Conv1D)


def _merge(tensor: Tensor, counts: tuple[int, ...]) -> Tensor:
    """View ``tensor`` with each run of ``counts`` axes merged into one, of size 1 if empty."""
    sizes, start = [], 0
    for count in counts:
        sizes.append(math.prod(tensor.shape[start : start + count]))
        start += count
    return tensor.view(sizes)
