"""How Keras kernels are seen as units x features, and which axes of H and D belong to them.

Keras keeps outputs last where torch has them first: a Dense kernel is (inputs, outputs), a
convolution's is HWIO for either data format, a transposed one's HWOI, a depthwise one's HWI x
multiplier, and an EinsumDense kernel is what its equation says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras

from neurms.core.ground.layout import Layout
from neurms.core.taps.activity import Activity

__all__ = ["bias_follows_units", "kernel_activity", "kernel_layout", "outputs_last"]

_layers = keras.layers
CONVOLUTIONS = (_layers.Conv1D, _layers.Conv2D, _layers.Conv3D)
TRANSPOSED = (_layers.Conv1DTranspose, _layers.Conv2DTranspose, _layers.Conv3DTranspose)
DEPTHWISE = (_layers.DepthwiseConv1D, _layers.DepthwiseConv2D)
SEPARABLE = (_layers.SeparableConv1D, _layers.SeparableConv2D)
RECURRENT = (_layers.LSTMCell, _layers.GRUCell, _layers.SimpleRNNCell)


@dataclass(frozen=True)
class _Einsum:
    """The letters of an EinsumDense equation, sorted by the part they play."""

    inputs: str
    kernel: str
    outputs: str

    @classmethod
    def of(cls, equation: str) -> _Einsum:
        sides, outputs = equation.replace(" ", "").split("->")
        inputs, kernel = sides.split(",")
        return cls(inputs, kernel, outputs)

    @property
    def shared(self) -> str:
        """Kernel letters in input and output: one independent matrix for each of their values."""
        return "".join(k for k in self.kernel if k in self.inputs and k in self.outputs)

    @property
    def units(self) -> str:
        return "".join(k for k in self.kernel if k in self.outputs and k not in self.inputs)

    @property
    def features(self) -> str:
        return "".join(k for k in self.kernel if k in self.inputs and k not in self.outputs)

    @property
    def is_linear_map(self) -> bool:
        """Whether the kernel is units x features, with at most one shared letter for groups."""
        parts = self.shared + self.units + self.features
        return (
            len(parts) == len(self.kernel) == len(set(self.kernel))
            and len(self.shared) <= 1
            and bool(self.shared or (self.units and self.features))
        )

    def axes(self, letters: str, tensor: str) -> tuple[int, ...] | None:
        """Return the letters' axes in a tensor, from the end; None if "..." hides their place."""
        named = tensor.rpartition("...")[2]
        if any(letter not in named for letter in letters):
            return None
        return tuple(named.index(letter) - len(named) for letter in letters)


def kernel_layout(layer: Any, variable: Any) -> Layout | None:
    """Return the layout of one of a Keras layer's own variables.

    Args:
        layer: The layer that owns the variable.
        variable: A ``keras.Variable``.

    Returns:
        The layout of a kernel of Dense, EinsumDense, a convolution (grouped, transposed,
        depthwise, separable), a recurrent cell, or of an Embedding's table; None for anything else.

    Example:
        >>> dense = keras.layers.Dense(3)
        >>> dense.build((None, 4))
        >>> layout = kernel_layout(dense, dense.kernel)
        >>> layout.units, layout.features
        (3, 4)
    """
    shape, name = tuple(variable.shape), variable.name
    rank = len(shape) - 2
    taps = tuple(range(rank))
    if isinstance(layer, SEPARABLE) and name == "depthwise_kernel":
        return Layout(shape, (rank, rank + 1), (), taps, shape[rank])
    if isinstance(layer, SEPARABLE) and name == "pointwise_kernel":
        return Layout(shape, (rank + 1,), (rank,), taps)
    if isinstance(layer, _layers.Embedding) and name == "embeddings":
        return Layout(shape, (1,), (0,))
    if isinstance(layer, RECURRENT) and name in ("kernel", "recurrent_kernel"):
        return Layout(shape, (1,), (0,))
    if name != "kernel" or getattr(layer, "quantization_mode", None):
        return None
    if isinstance(layer, _layers.EinsumDense):
        return _einsum_layout(layer.equation, shape)
    if isinstance(layer, _layers.Dense):
        return Layout(shape, (1,), (0,))
    if isinstance(layer, DEPTHWISE):
        return Layout(shape, (rank, rank + 1), (), taps, shape[rank])
    if isinstance(layer, TRANSPOSED):
        return Layout(shape, (rank,), (rank + 1,), taps)
    if isinstance(layer, CONVOLUTIONS):
        return Layout(shape, (rank + 1,), (rank,), taps, layer.groups)
    return None


def outputs_last(shape: tuple[int, ...]) -> Layout:
    """Return the layout of a variable that belongs to no layer: outputs last, as Keras has them."""
    axes = tuple(range(len(shape)))
    return Layout(shape, axes[-1:], axes[:-1]) if len(shape) > 1 else Layout(shape, (), axes)


def kernel_activity(layer: Any) -> Activity | None:
    """Return which axes of a layer's input and pre-activation count features and units.

    Args:
        layer: The layer.

    Returns:
        The activity, or None where one call multiplies with no kernel or with several, or an
        einsum's "..." hides an axis.
    """
    if isinstance(layer, _layers.EinsumDense):
        return _einsum_activity(layer.equation)
    if isinstance(layer, _layers.Dense):
        return Activity()
    if isinstance(layer, CONVOLUTIONS + TRANSPOSED + DEPTHWISE):
        axis = -1 if layer.data_format == "channels_last" else -1 - layer.rank
        return Activity((axis,), (axis,))
    return None


def bias_follows_units(layer: Any) -> bool:
    """Return whether the layer's bias, flattened, lists its kernel's units in their order.

    A recurrent cell's goes with two kernels, and a GRU's holds one for each.
    """
    if isinstance(layer, RECURRENT):
        return False
    if not isinstance(layer, _layers.EinsumDense):
        return True
    einsum = _Einsum.of(layer.equation)
    bias = "".join(letter for letter in einsum.outputs if letter in (layer.bias_axes or ""))
    return bias == einsum.shared + einsum.units


def _einsum_layout(equation: str, shape: tuple[int, ...]) -> Layout | None:
    einsum = _Einsum.of(equation)
    if not einsum.is_linear_map:
        return None
    units, features = (
        tuple(map(einsum.kernel.index, letters))
        for letters in (einsum.shared + einsum.units, einsum.features)
    )
    groups = shape[einsum.kernel.index(einsum.shared)] if einsum.shared else 1
    return Layout(shape, units, features, (), groups)


def _einsum_activity(equation: str) -> Activity | None:
    einsum = _Einsum.of(equation)
    if not einsum.is_linear_map:
        return None
    units = einsum.axes(einsum.shared + einsum.units, einsum.outputs)
    features = einsum.axes(einsum.shared + einsum.features, einsum.inputs)
    return None if units is None or features is None else Activity(units, features)
