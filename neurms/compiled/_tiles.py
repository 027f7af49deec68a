"""Shapes shared by the kernels: where scales broadcast, and how large tensors are walked.

An eager chain of operations over a large matrix writes its intermediate to memory and reads it
back; on a CPU that costs several times the arithmetic. Walking tiles of rows keeps the
intermediate in cache. Compiled forms fuse the chain themselves and get the whole tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor


def tile_elements() -> int:
    """Elements of a tile (a function, because TorchScript reads no module globals)."""
    # 2 MiB of float32. Measured on two cores for the two-sided update of a 4096 x 4096 matrix:
    # 32k elements 8.4 ms, 128k 4.2, 512k 3.6, untiled 19.6.
    return 524288


def is_tiled(t: Tensor) -> bool:
    """Whether an eager kernel should walk ``t`` in tiles."""
    if not torch.jit.is_scripting():
        if torch.compiler.is_compiling():
            return False
    return t.numel() > 2 * tile_elements() and t.device.type == "cpu"


def tile_length(t: Tensor, axis: int) -> int:
    """Slices along ``axis`` that make one tile of a non-empty tensor."""
    return max(1, tile_elements() // (t.numel() // t.size(axis)))


def part(t: Tensor | None, axis: int, start: int, length: int) -> Tensor | None:
    """The tile of a broadcastable factor; a factor of size 1 along ``axis`` serves every tile."""
    if t is None or t.dim() == 0 or t.size(axis) == 1:
        return t
    return t.narrow(axis, start, length)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums and products: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def along_units(s: Tensor, w: Tensor) -> Tensor:
    """Broadcast a unit scale (m,) along (m,), (m, n) or (groups, units, features, taps)."""
    if s.dim() == w.dim() or s.dim() == 0:
        return s
    if w.dim() == 2:
        return s.unsqueeze(1)
    if w.dim() == 4:
        return s.reshape(w.size(0), w.size(1), 1, 1)
    raise ValueError(f"w has {w.dim()} axes; pass (units, features) or (groups, units, features, taps)")


def along_features(c: Tensor, w: Tensor) -> Tensor:
    """Broadcast a feature scale (n,) along (m, n) or (groups, units, features, taps)."""
    if c.dim() == w.dim() or c.dim() == 0:
        return c
    if w.dim() == 2:
        return c.unsqueeze(0)
    if w.dim() == 4:
        return c.reshape(w.size(0), 1, w.size(2), 1)
    raise ValueError(f"w has {w.dim()} axes; pass (units, features) or (groups, units, features, taps)")
