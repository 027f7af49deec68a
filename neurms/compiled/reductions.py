"""Sums of squares over rows: the raw material of every second moment.

Eager squares and sums, instead of taking ``linalg.vector_norm`` (5 to 10 times slower on a CPU,
and its running sum loses a factor of 20 in accuracy over 10^4 rows) or a matrix-vector product
with ones (the same loss). Eager ``sum`` adds pairwise; TorchInductor's loop adds one by one, which
cost 3e-6 over 4096 rows, and is therefore given a float64 accumulator (no slower: bound by memory).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from neurms.compiled._tiles import accumulator, is_fused, is_tiled, tile_length
from neurms.compiled.backends import PROMPT, kernel
from neurms.compiled.native import LEAST_ELEMENTS, is_signal, library, reads, threads


def _squared(x: Tensor, scale: Tensor | None) -> Tensor:
    dtype = accumulator(x.dtype)
    if scale is not None:
        wide = x.to(dtype) / scale.to(x.device, dtype)
        return wide.square_()
    if x.dtype == dtype:
        return x * x
    return x.to(dtype).square_()


def _add_up(squares: Tensor, axis: int) -> Tensor:
    if is_fused() and squares.device.type == "cpu":
        return squares.sum(axis, dtype=torch.float64).to(squares.dtype)
    return squares.sum(axis)


def sum_of_squares(x: Tensor, scale: Tensor | None) -> Tensor:
    """Return the sums of squares of the columns of ``x``, shape (rows, k)."""
    if not is_tiled(x):
        return _add_up(_squared(x, scale), 0)
    total = torch.zeros(x.size(1), dtype=accumulator(x.dtype), device=x.device)
    for tile in x.split(tile_length(x, 0)):
        total += _add_up(_squared(tile, scale), 0)
    return total


def _channel_sum(x: Tensor, scale: Tensor | None) -> Tensor:
    return _add_up(_add_up(_squared(x, scale).flatten(2), 2), 0)


@kernel
def column_square_sum(x: Tensor, scale: Tensor | None = None) -> Tensor:
    """Sum of squares of every column.

    ``out_j = sum_rows (x_j / scale)^2``, cast and divided before squaring, so that half-precision
    errors and loss-scaled errors neither overflow nor vanish on the way.

    Args:
        x: Shape (rows, k) or (..., k), any floating dtype, any strides; every axis but the last
            counts as rows. No rows give zeros.
        scale: 0-d tensor to divide by (a loss scale), or None.

    Returns:
        Shape (k,), float64 for a float64 ``x``, else float32.

    Reference:
        NeuRMS, statistics of H and D. Settled: a loss scale divides in float32 *before* squaring,
        because its square does not fit what the sum is kept in.

    Example:
        >>> import torch
        >>> column_square_sum(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        tensor([10., 20.])
    """
    rows = x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)
    return sum_of_squares(rows, scale)


def _has_columns(x: Tensor, scale: Tensor | None) -> bool:
    """Return whether the native sums serve, which divide by no loss scale."""
    return x.numel() >= LEAST_ELEMENTS and _has_plain_columns(x, scale)


def _has_plain_columns(x: Tensor, scale: Tensor | None) -> bool:
    return (
        scale is None
        and x.ndim >= 2
        and 0 not in x.shape
        and is_signal(x)
        and library() is not None
    )


@column_square_sum.native(_has_columns, fits=_has_plain_columns)
def _column_square_sum(x: Tensor, scale: Tensor | None) -> Tensor:
    kernels = library()
    assert kernels is not None
    return _native_columns(kernels, x)[0]


def _native_columns(kernels: Any, x: Tensor) -> tuple[Tensor, int]:
    """Return the sums of a signal that the native form serves, and its rows."""
    columns = x.shape[-1]
    rows = x.numel() // columns
    squares = x.new_empty(columns, dtype=torch.float32)
    rounded = x.dtype is torch.bfloat16
    kernels.neurms_column_square_sum(
        x.data_ptr(), rounded, rows, columns, squares.data_ptr(), threads()
    )
    return squares, rows


@kernel
def channel_square_sum(x: Tensor, axis: int = 1, scale: Tensor | None = None) -> Tensor:
    """Sum of squares of every channel, over all the other axes, without copying ``x``.

    ``out_c = sum over batch and positions of (x[:, c, ...] / scale)^2``.

    Args:
        x: Shape (N, C, spatial...), or (C, spatial...) with ``axis=0``; any floating dtype, any
            memory format. An empty batch gives zeros.
        axis: The channel axis; negative counts from the end.
        scale: 0-d tensor to divide by before squaring (a loss scale), or None.

    Returns:
        Shape (C,), float64 for a float64 ``x``, else float32.

    Reference:
        NeuRMS on convolutions. Settled: v over output channels, u over input channels.

    Example:
        >>> import torch
        >>> channel_square_sum(torch.ones(2, 3, 4, 4))
        tensor([32., 32., 32.])
    """
    channel = axis + x.dim() if axis < 0 else axis
    batched = x.unsqueeze(0) if channel == 0 else x.movedim(channel, 1)
    if batched.dim() == 2:
        batched = batched.unsqueeze(2)
    if not is_tiled(batched):
        return _channel_sum(batched, scale)
    total = torch.zeros(batched.size(1), dtype=accumulator(x.dtype), device=x.device)
    for tile in batched.split(tile_length(batched, 0)):
        total += _channel_sum(tile, scale)
    return total


def _has_channels(x: Tensor, axis: int, scale: Tensor | None) -> bool:
    return x.numel() >= LEAST_ELEMENTS and _has_plain_channels(x, axis, scale)


def _has_plain_channels(x: Tensor, axis: int, scale: Tensor | None) -> bool:
    if scale is not None or not x.numel():
        return False
    return reads(x if x.is_contiguous() else x.movedim(axis, -1))


@channel_square_sum.native(_has_channels, fits=_has_plain_channels)
def _channel_square_sum(x: Tensor, axis: int, scale: Tensor | None) -> Tensor:
    channels = x.shape[axis]
    images = math.prod(x.shape[: axis % x.dim()])
    positions = x.numel() // (images * channels)
    if positions == 1 or not x.is_contiguous():
        squares: Tensor = _column_square_sum(x.movedim(axis, -1), scale)
        return squares
    kernels = library()
    assert kernels is not None
    squares = x.new_empty(channels, dtype=torch.float32)
    rounded = x.dtype is torch.bfloat16
    kernels.neurms_channel_square_sum(
        *(x.data_ptr(), rounded, images, channels, positions, squares.data_ptr(), threads())
    )
    return squares


def axes_square_sum(
    x: Tensor, axes: tuple[int, ...], scale: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, int]:
    """Return sums of squares over every axis but ``axes``, and how many rows those count.

    Args:
        x: Any floating dtype.
        axes: The axes that stay, counted from the end; they come out flattened, in this order.
        scale: 0-d tensor to divide by before squaring, or None.
        backend: How the kernel runs; given outright because backward passes may run in threads
            that do not see the caller's ``use_backend``.

    Example:
        >>> import torch
        >>> axes_square_sum(torch.ones(4, 2, 3), (-2,))
        (tensor([12., 12.]), 12)
    """
    last = axes == (-1,)
    if last and backend == PROMPT and scale is None and x.ndim > 1 and 0 not in x.shape:
        kernels = library() if is_signal(x) else None
        # As the kernel's form does, which takes as long to find as a small sum.
        if kernels is not None:
            return _native_columns(kernels, x)
    if x.requires_grad:
        x = x.detach()
    if last:
        return column_square_sum.on(backend)(x, scale), math.prod(x.shape[:-1])
    channels = math.prod([x.shape[axis] for axis in axes])
    rows = x.numel() // channels if channels else 0
    if len(axes) == 1:
        return channel_square_sum.on(backend)(x, axes[0] + x.ndim, scale), rows
    x = x.movedim(axes, tuple(range(-len(axes), 0))).reshape(rows, channels)
    return column_square_sum.on(backend)(x, scale), rows
