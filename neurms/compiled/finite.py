"""Whether a tensor holds a NaN, an infinity or a number beyond a bound, in one read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from neurms.compiled.backends import current_backend, kernel
from neurms.compiled.native import LEAST_ELEMENTS, library, reads, threads

__all__ = ["GREATEST", "all_finite", "all_within", "are_finite", "are_within"]

GREATEST = torch.finfo(torch.float32).max
"""The largest finite float32."""


@kernel
def all_finite(x: Tensor) -> bool:
    """Return whether every element is finite.

    A sum is non-finite whenever an element is, and reads at memory speed; only when it is are
    elements looked at, since a sum of huge finite numbers may overflow.

    Args:
        x: Any shape, any floating dtype.

    Returns:
        True for an empty tensor.

    Example:
        >>> import torch
        >>> all_finite(torch.tensor([1.0, float("inf")]))
        False
    """
    total = x.sum(dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    if bool(torch.isfinite(total)):
        return True
    return bool(torch.isfinite(x).all())


def _is_large(x: Tensor) -> bool:
    return x.numel() >= LEAST_ELEMENTS and reads(x)


@all_finite.native(_is_large, fits=reads)
def _all_finite(x: Tensor) -> bool:
    return _within(x, GREATEST)


def _within(x: Tensor, bound: float) -> bool:
    kernels = library()
    assert kernels is not None
    rounded = x.dtype is torch.bfloat16
    return bool(kernels.neurms_all_within(x.data_ptr(), rounded, x.numel(), bound, threads()))


@kernel
def all_within(x: Tensor, bound: float) -> bool:
    """Return whether no element's magnitude exceeds a bound.

    The Euclidean norm is no less than any magnitude, and reads at memory speed; only where it
    exceeds the bound are elements looked at.

    Args:
        x: Any shape, any floating dtype.
        bound: At least 1e-15, whose square does not underflow; compared in float32, in float64 with
            a float64 ``x``.

    Returns:
        False where there is a NaN; True for an empty tensor.

    Example:
        >>> import torch
        >>> all_within(torch.tensor([1.0, -3.0]), 2.0)
        False
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if bool(torch.linalg.vector_norm(x, 2.0, None, False, dtype=dtype) <= bound):
        return True
    return bool((x.to(dtype).abs() <= bound).all())


@all_within.native(
    lambda x, bound: bound <= GREATEST and _is_large(x),
    fits=lambda x, bound: bound <= GREATEST and reads(x),
)
def _all_within(x: Tensor, bound: float) -> bool:
    return _within(x, bound)


def are_finite(tensors: Sequence[Tensor]) -> bool:
    """Return whether every element of several CPU tensors is finite, small ones in one call.

    Args:
        tensors: Any shapes, any floating dtypes.

    Returns:
        True without tensors.
    """
    return _small_together(tensors, all_finite.on(_kind()))


def are_within(tensors: Sequence[Tensor], bound: float) -> bool:
    """Return whether no magnitude in several CPU tensors exceeds a bound, as :func:`are_finite`.

    Args:
        tensors: Any shapes, any floating dtypes.
        bound: At least 1e-15.

    Returns:
        False where there is a NaN; True without tensors.
    """
    look = all_within.on(_kind())
    return _small_together(tensors, lambda tensor: look(tensor, bound))


def _kind() -> str:
    # No compiled form exists: a graph cannot hold an answer that is a Python bool.
    return "eager" if current_backend() == "eager" else "auto"


def _small_together(tensors: Sequence[Tensor], look: Callable[[Tensor], bool]) -> bool:
    small: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel() >= LEAST_ELEMENTS:
            if not look(tensor):
                return False
        else:
            small.setdefault(tensor.dtype, []).append(tensor.reshape(-1))
    return all(look(torch.cat(parts)) for parts in small.values())
