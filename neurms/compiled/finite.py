"""Whether a tensor holds a NaN or an infinity, in one read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from neurms.compiled.backends import PROMPT, current_backend, kernel
from neurms.compiled.native import LEAST_ELEMENTS, fits, library, suits, threads

__all__ = ["all_finite", "are_finite"]


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


@all_finite.native(suits, fits=fits)
def _all_finite(x: Tensor) -> bool:
    kernels = library()
    assert kernels is not None
    return bool(kernels.neurms_all_finite(x.data_ptr(), x.numel(), threads()))


def are_finite(tensors: Sequence[Tensor], prompt: bool = False) -> bool:
    """Return whether every element of several CPU tensors is finite, small ones in one call.

    Args:
        tensors: Any shapes, any floating dtypes.
        prompt: Whether to look natively at small ones too.

    Returns:
        True without tensors.
    """
    if prompt:
        look = all_finite.on(PROMPT)
        return all(look(tensor) for tensor in tensors)
    # No compiled form exists: a graph cannot hold an answer that is a Python bool.
    look = all_finite.on("eager" if current_backend() == "eager" else "auto")
    small: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel() >= LEAST_ELEMENTS:
            if not look(tensor):
                return False
        else:
            small.setdefault(tensor.dtype, []).append(tensor.reshape(-1))
    return all(look(torch.cat(parts)) for parts in small.values())
