"""Optimizers by name: the rules of this library, and torch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from neurms.core.optimizers.base import Params, PreconditionedOptimizer
from neurms.core.optimizers.rules import RULES, rule_class

__all__ = ["available", "create", "is_torch", "optimizer_class"]

_TORCH = {
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adafactor": torch.optim.Adafactor,
}


def available() -> list[str]:
    """Return the names that :func:`create` knows: this library's rules, then torch's own."""
    return [*RULES, *_TORCH]


def is_torch(name: str) -> bool:
    """Return whether a name stands for one of torch's own optimizers."""
    return name in _TORCH


def optimizer_class(name: str) -> type[PreconditionedOptimizer]:
    """Return this library's optimizer class for a snake_case name.

    Raises:
        ValueError: No rule of this library has that name.
    """
    found: type[PreconditionedOptimizer] = rule_class(name)
    return found


def create(name: str, params: Params, **settings: Any) -> torch.optim.Optimizer:
    """Make an optimizer by its name.

    Args:
        name: One of :func:`available`; torch's own optimizers go by ``sgd``, ``adamw``, ...
        params: A model, parameters, named parameters or parameter groups.
        **settings: The optimizer's keyword arguments.

    Returns:
        The optimizer.

    Raises:
        ValueError: No optimizer has that name, or a setting is out of its range.
        TypeError: The optimizer has no such setting.

    Example:
        >>> import torch, neurms
        >>> type(neurms.create("racs", torch.nn.Linear(3, 2), lr=0.01)).__name__
        'RACS'
    """
    if name in _TORCH:
        parameters = params.parameters() if isinstance(params, nn.Module) else params
        torch_class: Callable[..., torch.optim.Optimizer] = _TORCH[name]
        return torch_class(parameters, **settings)
    if name not in RULES:
        raise ValueError(f"name={name!r} is not known; choose one of {available()}")
    our_class: Callable[..., PreconditionedOptimizer] = optimizer_class(name)
    return our_class(params, **settings)
