"""Optimizers by name: the rules of this library, and torch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from neurms.core.ground.errors import meant
from neurms.core.optimizers.base import Params, PreconditionedOptimizer
from neurms.core.optimizers.beside import ModelGroups
from neurms.core.optimizers.rules import announce, rule_class, rule_names
from neurms.core.routing import FALLBACK

__all__ = ["available", "create", "is_torch", "optimizer_class", "register"]

_TORCH = {
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adafactor": torch.optim.Adafactor,
}


def available() -> list[str]:
    """Return the names that :func:`create` knows: the rules, then torch's own."""
    return [*rule_names(), *_TORCH]


def is_torch(name: str) -> bool:
    """Return whether a name stands for one of torch's own optimizers."""
    return name in _TORCH


def optimizer_class(name: str) -> type[PreconditionedOptimizer]:
    """Return the optimizer class of a rule by its snake_case name.

    Raises:
        ValueError: No rule has that name.
    """
    found: type[PreconditionedOptimizer] = rule_class(name)
    return found


def register(rule: type[PreconditionedOptimizer]) -> type[PreconditionedOptimizer]:
    """Make a rule of your own known by its name, as the library's rules are.

    From then on :func:`create`, :func:`available`, :func:`neurms.memory_report`, the ``"rule"`` of
    a parameter group, the command line, ``optimizer_config`` and ``keras_optimizer`` find it.

    Args:
        rule: An optimizer class with a :attr:`rule` (its snake_case name) and a ``recipe``. What
            was registered under that name before by the same class gives way, so that a notebook
            cell may run twice.

    Returns:
        The class, so that this serves as a decorator.

    Raises:
        TypeError: ``rule`` is no such class.
        ValueError: Its name is no identifier, or belongs to another rule.

    Example:
        >>> import neurms
        >>> from neurms.core.structures.one_sided_diagonal import RowNormalized
        >>> @neurms.register
        ... class RowSGD(neurms.PreconditionedOptimizer):
        ...     rule = "row_sgd"
        ...
        ...     def __init__(self, params, lr=1e-2, **common):
        ...         super().__init__(params, {"lr": lr}, common)
        ...
        ...     @classmethod
        ...     def recipe(cls, settings):
        ...         return neurms.Recipe((RowNormalized(),))
        >>> "row_sgd" in neurms.available()
        True
    """
    if not (isinstance(rule, type) and issubclass(rule, PreconditionedOptimizer)):
        raise TypeError(f"rule={rule!r} must be a subclass of neurms.PreconditionedOptimizer")
    name = getattr(rule, "rule", None)
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(
            f'{rule.__name__}.rule={name!r} must be a snake_case name; write rule = "my_rule" in '
            "the class"
        )
    if name in _TORCH or name == FALLBACK or (name in rule_names() and _is_other(name, rule)):
        raise ValueError(f"{rule.__name__}.rule={name!r} is taken already; choose another name")
    announce(name, lambda: rule)
    return rule


def _is_other(name: str, rule: type[Any]) -> bool:
    known = rule_class(name)
    return (known.__module__, known.__qualname__) != (rule.__module__, rule.__qualname__)


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
        parameters = _parameters(params, settings) if isinstance(params, nn.Module) else params
        torch_class: Callable[..., torch.optim.Optimizer] = _TORCH[name]
        return torch_class(parameters, **settings)
    if name not in rule_names():
        near = meant(name, available())
        raise ValueError(f"name={name!r} is not known{near}; choose one of {available()}")
    our_class: Callable[..., PreconditionedOptimizer] = optimizer_class(name)
    return our_class(params, **settings)


def _parameters(model: nn.Module, settings: dict[str, Any]) -> Any:
    """Return a model's parameters for one of torch's own optimizers, in its groups if it has some.

    Groups are taken out of ``settings``: torch knows them as parameters only.
    """
    groups = settings.pop("groups", None)
    if groups is None:
        return model.parameters()
    beside = ModelGroups.of(model, groups)
    own = [{**group, "params": [p for _, p in group["params"]]} for group in beside.groups]
    taken = {id(p) for group in own for p in group["params"]}
    rest = [p for p in model.parameters() if id(p) not in taken]
    return [*own, {"params": rest}] if rest else own
