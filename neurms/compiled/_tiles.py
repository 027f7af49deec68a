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


def is_fused() -> bool:
    """Whether TorchInductor is tracing: chains of operations will become one loop."""
    # TorchScript leaves a branch uncompiled only in exactly this form.
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return False
    else:
        return torch.compiler.is_compiling()


def is_tiled(t: Tensor) -> bool:
    """Whether an eager kernel should walk ``t`` in tiles."""
    if is_fused():
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
    if w.dim() == 4 and s.dim() == 1 and s.size(0) == w.size(0) * w.size(1):
        return s.reshape(w.size(0), w.size(1), 1, 1)
    if w.dim() <= 2 and s.dim() == 1 and s.size(0) == w.size(0):
        return s.unsqueeze(1) if w.dim() == 2 else s
    if s.dim() != w.dim() or w.dim() == 1:
        raise ValueError(
            f"s of shape {s.shape} has no factor for every unit of w of shape {w.shape}; pass (m,) "
            "with w as (m,), (m, n) or (groups, units, features, taps)"
        )
    return s


def along_features(c: Tensor, w: Tensor) -> Tensor:
    """Broadcast a feature scale (n,) along (m, n) or (groups, units, features, taps)."""
    if w.dim() == 4 and c.dim() == 1 and c.size(0) == w.size(0) * w.size(2):
        return c.reshape(w.size(0), 1, w.size(2), 1)
    if w.dim() == 2 and c.dim() == 1 and c.size(0) == w.size(1):
        return c.unsqueeze(0)
    if c.dim() != w.dim() or w.dim() == 1:
        raise ValueError(
            f"c of shape {c.shape} has no factor for every feature of w of shape {w.shape}; pass "
            "(n,) with w as (m, n) or (groups, units, features, taps)"
        )
    return c


def check_same_shape(name: str, t: Tensor, w: Tensor) -> None:
    """Refuse, before anything is changed, a tensor that would broadcast into the weight."""
    if t.shape != w.shape:
        raise ValueError(f"{name} of shape {t.shape} must have the shape of w, {w.shape}")
