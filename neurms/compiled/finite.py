"""Whether tensors hold a NaN, an infinity or a number beyond a bound, in one read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from neurms.compiled._tiles import accumulator
from neurms.compiled.lists import list_kernel
from neurms.compiled.native import (
    LEAST_ELEMENTS,
    addresses,
    are_plain,
    is_signal,
    library,
    numbers,
    threads,
)

__all__ = ["GREATEST", "are_small", "within"]

GREATEST = torch.finfo(torch.float32).max
"""The largest finite float32."""


@list_kernel
def within(tensors: Sequence[Tensor], bounds: Sequence[float]) -> bool:
    """Return whether no magnitude in any of several tensors exceeds that tensor's bound.

    The Euclidean norm is no less than any magnitude, and reads at memory speed; only where it
    exceeds the bound are elements looked at. An accelerator is waited for once, twice if need be.

    Args:
        tensors: Any shapes, any floating dtypes.
        bounds: At least 1e-15 each, whose square does not underflow; compared in float32, in
            float64 with a float64 tensor. ``torch.finfo(dtype).max`` asks for finite numbers.

    Returns:
        False where there is a NaN; True without tensors.

    Example:
        >>> import torch
        >>> within([torch.tensor([1.0]), torch.tensor([-3.0, 2.0])], [2.0, 2.0])
        False
    """
    norms = [torch.linalg.vector_norm(x, dtype=accumulator(x.dtype)) for x in tensors]
    looks = [norm <= bound for norm, bound in zip(norms, bounds, strict=True)]
    if _all_true(looks):
        return True
    each = zip(tensors, bounds, strict=True)
    return _all_true([(x.to(accumulator(x.dtype)).abs() <= bound).all() for x, bound in each])


def are_small(tensors: Sequence[Tensor], bounds: Sequence[float]) -> bool:
    """Return whether norms alone show a few small tensors to be within bounds.

    Where they do not, or where a tensor is large, :func:`within` has to be asked: this is its first
    look, with as few calls as a layer's backward can pay.

    Args:
        tensors: Any shapes, any floating dtypes, on the CPU.
        bounds: What the entries of each may be at most.

    Example:
        >>> import torch
        >>> are_small([torch.tensor([3.0, 4.0])], [5.0]), are_small([torch.ones(9)], [2.0])
        (True, False)
    """
    for x, bound in zip(tensors, bounds, strict=True):
        if x.dtype is not torch.float32 or not x.is_cpu or x.numel() >= LEAST_ELEMENTS:
            return False
        if not float(torch.linalg.vector_norm(x)) <= bound:
            return False
    return True


def _all_true(looks: Sequence[Tensor]) -> bool:
    if len(looks) < 2:
        return not looks or bool(looks[0])
    return bool(torch.stack([look.to(looks[0].device) for look in looks]).all())


def _are_readable(tensors: Sequence[Tensor], bounds: Sequence[float]) -> list[bool]:
    """Return which items the native form serves."""
    if are_plain(tensors):
        return [bound <= GREATEST for bound in bounds]
    return [bound <= GREATEST and is_signal(x) for x, bound in zip(tensors, bounds, strict=True)]


@within.native(_are_readable)
def _within(tensors: Sequence[Tensor], bounds: Sequence[float]) -> bool:
    kernels = library()
    assert kernels is not None
    return bool(
        kernels.neurms_within(
            len(tensors),
            addresses(tensors),
            numbers("i", [x.dtype is torch.bfloat16 for x in tensors]),
            numbers("q", map(Tensor.numel, tensors)),
            numbers("f", bounds),
            threads(),
        )
    )
