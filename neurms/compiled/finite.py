"""Whether a tensor holds a NaN or an infinity, in one read."""

from __future__ import annotations

import torch
from torch import Tensor

from neurms.compiled.backends import kernel
from neurms.compiled.native import library, pointer, suits, threads

__all__ = ["all_finite"]


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


@all_finite.native(suits)
def _all_finite(x: Tensor) -> bool:
    kernels = library()
    assert kernels is not None
    return bool(kernels.neurms_all_finite(pointer(x), x.numel(), threads()))
