"""Native CPU kernels: C++ where torch's loops cannot reach the memory's speed.

They come with the wheel, or are built where a compiler is (``load.py``). They are never required:
each is the ``auto`` form of a kernel whose eager definition is the
specification, and serves contiguous float32 CPU tensors of at least :data:`LEAST_ELEMENTS`. The
choice depends on shapes alone, never on timing, so that a resumed run computes what an
uninterrupted one would.
"""

from __future__ import annotations

import ctypes
import functools
import os

import torch
from torch import Tensor

from neurms.compiled.native.build import CACHE_VARIABLE
from neurms.compiled.native.load import library, origin, warm_up
from neurms.compiled.native.toolchain import compiler

__all__ = [
    "CACHE_VARIABLE",
    "LEAST_ELEMENTS",
    "bfloat16_engine",
    "compiler",
    "fits",
    "is_plain",
    "library",
    "origin",
    "pointer",
    "reads",
    "suits",
    "threads",
    "warm_up",
]

LEAST_ELEMENTS = 1 << 15
"""Below, eager calls are as fast and a short run would not earn the compiler's seconds back."""


def fits(*operands: Tensor | None) -> bool:
    """Return whether native kernels can read these operands, however small; builds the library."""
    for operand in operands:
        if operand is not None and not is_plain(operand):
            return False
    return library() is not None


def suits(matrix: Tensor, *others: Tensor | None) -> bool:
    """Return whether native kernels serve these operands, building the library if they would.

    Args:
        matrix: The operand whose size decides.
        *others: Further operands; None for absent ones.
    """
    return matrix.numel() >= LEAST_ELEMENTS and fits(matrix, *others)


def reads(*signals: Tensor) -> bool:
    """Return whether native kernels can read these signals: as :func:`fits`, or bfloat16."""
    for signal in signals:
        stored = signal.dtype is torch.bfloat16 and signal.is_cpu and signal.is_contiguous()
        if not (is_plain(signal) or (stored and type(signal) in _PLAIN)):
            return False
    return library() is not None


@functools.cache
def bfloat16_engine() -> int:
    """Return what multiplies bfloat16 numbers: 2 is AMX, 1 AVX512-BF16, 0 nothing that gains."""
    kernels = library()
    return 0 if kernels is None else int(kernels.neurms_bf16_engine())


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    """Return where a tensor's elements begin."""
    return ctypes.c_void_p(tensor.data_ptr())


def threads() -> int:
    """Return how many threads torch may use here, which the kernels keep to.

    A forked child gets one: it inherits OpenMP's record of threads, but not the threads, and would
    wait for them for ever.
    """
    return 1 if _forked else torch.get_num_threads()


_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


_PLAIN = (Tensor, torch.nn.Parameter)


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is what the kernels read: contiguous float32 on the CPU."""
    return (
        type(tensor) in _PLAIN
        and tensor.dtype is torch.float32
        and tensor.is_cpu
        and tensor.is_contiguous()
    )
