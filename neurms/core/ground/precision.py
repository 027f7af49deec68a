"""How an update computed in float32 reaches a parameter of lower precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor

__all__ = ["LowPrecision", "compute_dtype", "round_stochastically", "without_autocast", "write_"]

LowPrecision = Literal["nearest", "stochastic", "master"]


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which nothing is cast by autocast: a step may be taken inside one."""
    kind = device.type
    # A question that takes longer than the other one, for which it has no answer everywhere.
    available = kind == "cpu" or torch.amp.is_autocast_available(kind)
    if available and torch.is_autocast_enabled(kind):
        off: AbstractContextManager[None] = torch.autocast(kind, enabled=False)
        return off
    return nullcontext()


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of statistics and updates: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def write_(
    parameter: Tensor,
    value: Tensor,
    rounding: LowPrecision,
    generator: torch.Generator | None = None,
) -> None:
    """Write a float32 ``value`` into a bfloat16 or float16 ``parameter``.

    With ``"nearest"`` updates below half a unit in the last place are lost; ``"stochastic"`` keeps
    them in expectation. ``"master"`` rounds to nearest too: its float32 copy is what remembers.

    Args:
        parameter: Destination, any floating dtype.
        value: New value, same shape, float32.
        rounding: How to round.
        generator: Source of the random bits for ``"stochastic"``.
    """
    if rounding == "stochastic" and parameter.dtype == torch.bfloat16:
        value = round_stochastically(value, generator)
    parameter.copy_(value)


def round_stochastically(value: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Round float32 to bfloat16, up or down with probability proportional to nearness.

    bfloat16 is the upper half of a float32: adding 16 uniform random bits below it and truncating
    carries with just the wanted probability. Non-finite values pass unchanged.
    """
    noise = torch.randint(
        0, 1 << 16, value.shape, dtype=torch.int32, device="cpu", generator=generator
    )
    bits = value.contiguous().view(torch.int32) + noise.to(value.device)
    rounded = (bits & -65536).view(torch.float32).to(torch.bfloat16)
    return torch.where(torch.isfinite(value), rounded, value.to(torch.bfloat16))
