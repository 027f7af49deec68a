"""Whether tensors hold a NaN, an infinity or a number beyond a bound, in one read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from neurms.compiled._tiles import accumulator
from neurms.compiled.lists import list_kernel
from neurms.compiled.native import addresses, are_plain, is_signal, library, numbers, threads

__all__ = ["GREATEST", "within"]

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
