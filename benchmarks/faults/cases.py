"""Which optimizers the fault matrix tries, and how their state is compared."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "NeuRMS U": ("neurms", {"variant": "U", "momentum": 0.9}),
    "NeuRMS B": ("neurms", {"variant": "B"}),
    "NeuRMS F": ("neurms", {"variant": "F", "momentum": 0.9}),
    "NeuRMS backward": ("neurms", {"variant": "U", "update": "backward", "momentum": 0.9}),
    "RMNP": ("rmnp", {}),
    "RACS": ("racs", {}),
    "Alice": ("alice", {"rank": 4, "leading": 2, "interval": 2}),
    "SharedBasis": ("shared_basis", {"rank": 2}),
    "SOAP": ("soap", {"interval": 2}),
    "Muon": ("muon", {}),
}
LR = 0.01
BATCHES = 5
STRIKES = 2
"""The batch at which a fault strikes."""


def batch(number: int) -> tuple[Tensor, Tensor]:
    """Return the inputs and targets of one step."""
    generator = torch.Generator().manual_seed(100 + number)
    return torch.randn(6, 8, generator=generator), torch.randn(6, 3, generator=generator)


def bits(value: Any) -> Any:
    """Return a copy of nested state to compare with."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: bits(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(entry) for entry in value]
    return value


def same(first: Any, second: Any) -> bool:
    """Return whether two results of :func:`bits` are equal in every bit; NaN equals NaN."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.dtype == second.dtype and torch.equal(
            first.nan_to_num(7.0), second.nan_to_num(7.0)
        )
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


@contextmanager
def no_space(size: int = 512) -> Iterator[None]:
    """Let no file grow beyond ``size`` bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Hostile:
    """A pickle that runs a command when it is loaded without care."""

    def __init__(self, witness: str) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return open, (self.witness, "w")
