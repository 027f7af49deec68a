"""Native CPU kernels: C++ where torch's loops cannot reach the memory's speed.

They are never required: each is the ``auto`` form of a kernel whose eager definition is the
specification, and serves contiguous float32 CPU tensors of at least :data:`LEAST_ELEMENTS`. The
choice depends on shapes alone, never on timing, so that a resumed run computes what an
uninterrupted one would.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from neurms.compiled.native.build import CACHE_VARIABLE, compiler, library

__all__ = ["CACHE_VARIABLE", "LEAST_ELEMENTS", "compiler", "library", "pointer", "suits", "threads"]

LEAST_ELEMENTS = 1 << 15
"""Below, eager calls are as fast and a short run would not earn the compiler's seconds back."""


def suits(matrix: Tensor, *others: Tensor | None) -> bool:
    """Return whether native kernels serve these operands, building the library if they would.

    Args:
        matrix: The operand whose size decides.
        *others: Further operands; None for absent ones.
    """
    if matrix.numel() < LEAST_ELEMENTS:
        return False
    return all(_is_plain(x) for x in (matrix, *others) if x is not None) and library() is not None


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    """Return where a tensor's elements begin."""
    return ctypes.c_void_p(tensor.data_ptr())


def threads() -> int:
    """Return how many threads torch may use here, which the kernels keep to."""
    return torch.get_num_threads()


def _is_plain(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        and tensor.is_contiguous()
    )
