"""Native CPU kernels: C++ where torch's loops cannot reach the memory's speed.

They come with the wheel, or are built where a compiler is (``load.py``). They are never required:
each is the ``auto`` form of a kernel whose eager definition is the specification, and serves
contiguous float32 CPU tensors of at least :data:`LEAST_ELEMENTS`. The choice depends on shapes
alone, never on timing, so that a resumed run computes what an uninterrupted one would.
"""

from __future__ import annotations

import functools
import os
from array import array
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from neurms.compiled.native.build import CACHE_VARIABLE
from neurms.compiled.native.load import in_use, library, origin, warm_up
from neurms.compiled.native.toolchain import compiler

__all__ = [
    "CACHE_VARIABLE",
    "LEAST_ELEMENTS",
    "PLAIN",
    "addresses",
    "are_plain",
    "bfloat16_engine",
    "compiler",
    "fits",
    "in_use",
    "is_plain",
    "is_signal",
    "library",
    "numbers",
    "origin",
    "reads",
    "suits",
    "threads",
    "warm_up",
    "wide_float32",
]

LEAST_ELEMENTS = 1 << 15
"""Below, eager calls are as fast and a short run would not earn the compiler's seconds back."""


def fits(*operands: Tensor | None) -> bool:
    """Return whether native kernels can read these operands, however small; loads the library."""
    return are_plain([x for x in operands if x is not None]) and library() is not None


def suits(matrix: Tensor, *others: Tensor | None) -> bool:
    """Return whether native kernels serve these operands, loading the library if they would.

    Args:
        matrix: The operand whose size decides.
        *others: Further operands; None for absent ones.
    """
    return matrix.numel() >= LEAST_ELEMENTS and fits(matrix, *others)


def is_signal(tensor: Tensor) -> bool:
    """Return whether a tensor is plain, or would be in float32 and is bfloat16."""
    return (
        type(tensor) in PLAIN
        and (tensor.dtype is torch.float32 or tensor.dtype is torch.bfloat16)
        and tensor.is_cpu
        and tensor.is_contiguous()
    )


def reads(*signals: Tensor) -> bool:
    """Return whether native kernels can read these signals; builds the library."""
    return all(map(is_signal, signals)) and library() is not None


@functools.cache
def bfloat16_engine() -> int:
    """Return what multiplies bfloat16 numbers: 2 is AMX, 1 AVX512-BF16, 0 nothing that gains."""
    kernels = library()
    return 0 if kernels is None else int(kernels.neurms_bf16_engine())


@functools.cache
def wide_float32() -> bool:
    """Return whether vectors of 512 bits multiply float32 faster here than torch's BLAS library."""
    kernels = library()
    return kernels is not None and bool(kernels.neurms_wide_float32())


_NOTHING = torch.empty(0, device="cpu")


def addresses(tensors: Sequence[Tensor | None]) -> bytes:
    """Return where the elements of several tensors begin, as an array of C; null for None."""
    there = [_NOTHING if x is None else x for x in tensors]
    return array("Q", map(Tensor.data_ptr, there)).tobytes()


def numbers(kind: str, values: Iterable[Any]) -> bytes:
    """Return numbers as an array of C; ``kind`` is a type code of :mod:`array`."""
    return array(kind, values).tobytes()


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


PLAIN = frozenset((Tensor, torch.nn.Parameter))
"""Types whose numbers lie in memory; a subclass may keep them elsewhere."""

_FLOAT = frozenset((torch.float32,))
_dtype, _is_cpu = attrgetter("dtype"), attrgetter("is_cpu")


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is what the kernels read: contiguous float32 on the CPU."""
    return (
        type(tensor) in PLAIN
        and tensor.dtype is torch.float32
        and tensor.is_cpu
        and tensor.is_contiguous()
    )


def are_plain(tensors: Sequence[Tensor], dtypes: frozenset[torch.dtype] = _FLOAT) -> bool:
    """Return whether all tensors are plain, in as many calls for ten as for one.

    Args:
        tensors: The tensors.
        dtypes: What their dtypes may be.
    """
    return (
        PLAIN.issuperset(map(type, tensors))
        and dtypes.issuperset(map(_dtype, tensors))
        and all(map(_is_cpu, tensors))
        and all(map(Tensor.is_contiguous, tensors))
    )
